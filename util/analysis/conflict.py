"""How much the heads that teach one encoder disagree about where to look (Co-DETR, eqs. 9 to 12).

C(H) is the Grad-CAM of head H on the encoder's output: the logits of its positive pairs, each of the object's class,
are summed, the weight of a channel is the spatial mean of the gradient, and the levels of ReLU(weighted sum) are
resized to the image and averaged. S_ij is the mean over images of KL(C(H_i) || C(H_j)), both normalised over the
pixels, and the average distance of an auxiliary head is half the mean of S_ij + S_ji over the other auxiliary heads; a
single one is compared with the DETR head (the one-to-one queries after the last decoder layer).

The paper leaves two things open. A share `EPSILON` of every distribution is uniform, so that KL stays finite where a
CAM is 0; a CAM that is 0 everywhere is uniform altogether, and how often this happened is written. Images without
objects have no pairs and are left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.assign import Request
from models.aux_heads.base import AuxOutput, Objects
from models.criterion import Criterion
from models.detector import Detector
from models.groups.collaborative import Collaborative
from util import dist
from util.analysis.base import Subject, read_json
from util.analysis.conflict_plot import draw_conflict, draw_examples
from util.analysis.discriminability_plot import Example
from util.analysis.maps import on_image, picture, valid_sizes
from util.errors import UserError
from util.structures import DetectorOutput, FlatTargets, Memory, Target

DETR = "detr"  # its row comes first
EPSILON = 1e-3  # share of the uniform distribution
EXAMPLES = 3  # images that are drawn
Result = dict[str, Any]


def analyse_conflict(subject: Subject) -> list[Path]:
    """Write `conflict.json` and, with matplotlib, `conflict.png` and `conflict_examples.png`.

    Raises:
        UserError: the detector has no auxiliary heads, no image has an object, a map is not finite, or a file of
            `subject.others` is not such a .json file.
    """
    others = [read_result(path) for path in subject.others]
    result, examples = measure(subject)
    path = subject.folder / "conflict.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    dist.info(table([result, *others]))
    try:
        drawn = draw_conflict([result, *others], subject.folder / "conflict.png")
        shown = draw_examples(examples, result["heads"], subject.folder / "conflict_examples.png")
    except UserError as error:
        dist.info(f"no pictures: {error}")
        return [path]
    return [path, drawn, shown]


def measure(subject: Subject) -> tuple[Result, list[Example]]:
    """Return what the .json file holds, and the first images with their maps."""
    model, source = subject.model, auxiliary_heads(subject.model)
    names = [DETR, *source.heads]
    model.requires_grad_(False)  # gradients begin at the memory: nothing of backbone and encoder is kept for them
    model.eval()
    source.train()
    total = torch.zeros(len(names), len(names), dtype=torch.float64)
    count, left_out, blank, examples = 0, 0, Counter(dict.fromkeys(names, 0)), []
    for images, targets in subject.batches("conflict"):
        with watch(model) as seen:
            output = model(images, targets)
        scores = {DETR: score_of_pairs(output, subject.criterion, targets)}
        scores |= {name: score_of_samples(*found) for name, found in seen.heads.items()}
        slopes = [gradient(score, seen.memory) for score in scores.values()]
        for i, (target, valid, size) in enumerate(zip(targets, valid_sizes(seen.memory), images.sizes)):
            if len(target) == 0:
                left_out += 1
                continue
            cams = torch.stack([grad_cam(seen.memory, slope, i, valid, size) for slope in slopes])
            _check_finite(cams, names, target.image_id)
            total += distances(cams)
            count += 1
            blank.update(name for name, cam in zip(names, cams) if not cam.any())
            if len(examples) < EXAMPLES:
                shown = dict(zip(names, cams))
                examples.append(Example(target.image_id, picture(images, i), target.boxes.cpu(), shown))
    if count == 0:
        raise UserError("--analyse conflict: no validation image has an object, so there are no pairs to look at")
    matrix = total / count
    result = {
        "analysis": "conflict",
        "label": subject.label,
        "images": count,
        "images_without_objects": left_out,
        "epsilon": EPSILON,
        "heads": names,
        "matrix": matrix.tolist(),  # row i, column j: KL(C_i || C_j)
        "averages": dict(zip(names[1:], average_distances(matrix).tolist())),
        "images_without_map": dict(blank),
    }
    return result, examples


def auxiliary_heads(model: Detector) -> Collaborative:
    """Return the source of the auxiliary heads.

    Raises:
        UserError: there is none.
    """
    for source in model.groups.values():
        if isinstance(source, Collaborative):
            return source
    raise UserError(
        "--analyse conflict compares auxiliary heads, and these flags make none: give --aux_heads as in training; a "
        "detector that was trained without them has no conflict to measure"
    )


@dataclass
class Seen:
    """What was seen of one forward pass."""

    memory: Memory | None = None  # of the encoder that inference uses; its tokens are a leaf
    heads: dict[str, tuple[AuxOutput, Objects]] = field(default_factory=dict)


@contextmanager
def watch(model: Detector) -> Iterator[Seen]:
    """Watch one forward pass; gradients end at the encoder's output, and queries of auxiliary heads are not made."""
    source, seen = auxiliary_heads(model), Seen()

    def cut(module, inputs, memory: Memory) -> Memory:
        seen.memory = replace(memory, tokens=memory.tokens.detach().requires_grad_())
        return seen.memory

    def remember(name: str):
        def hook(module, inputs: tuple, output: AuxOutput) -> None:
            seen.heads[name] = (output, inputs[1])

        return hook

    handles = [model.transformer.encoder.register_forward_hook(cut)]
    handles += [head.register_forward_hook(remember(name)) for name, head in source.heads.items()]
    queries, source.queries = source.queries, None
    try:
        yield seen
    finally:
        source.queries = queries
        for handle in handles:
            handle.remove()


def score_of_pairs(output: DetectorOutput, criterion: Criterion, targets: Sequence[Target]) -> Tensor:
    """Return the logits of the one-to-one pairs of the last decoder layer, each of the object's class, summed: ().

    Pairs are those of the assigner that teaches this layer.
    """
    supervised, flat = output.sets["one2one"], FlatTargets.of(targets)
    last = supervised.predictions.layers - 1
    supervision = next(s for s in supervised.supervision if s.layers is None or last in s.layers)
    supervision = replace(supervision, repeat=1)  # early epochs may match an object several times
    predictions = supervised.predictions.select_layers([last])
    request = Request("one2one", predictions, flat, supervision, layers=[last])
    (pairs,) = criterion.assigners[supervision.assign]([request])
    labels = flat.labels[flat.starts[pairs.image] + pairs.target]
    logits = predictions.logits[0, pairs.image, pairs.slot, labels]
    return logits.sum() if pairs.weight is None else torch.where(pairs.weight > 0, logits, 0.0).sum()


def score_of_samples(output: AuxOutput, objects: Objects) -> Tensor:
    """Return the logits of the positives of an auxiliary head, each of the object's class, summed: ()."""
    labels = objects.labels.gather(1, output.samples.target)
    own = output.logits.gather(2, labels[..., None]).squeeze(-1)
    return torch.where(output.samples.positive, own, 0.0).sum()


def gradient(score: Tensor, memory: Memory) -> Memory:
    """Return the gradient of a score with respect to the tokens, laid out as the memory."""
    (tokens,) = torch.autograd.grad(score, memory.tokens, retain_graph=True)
    return replace(memory, tokens=tokens)


def grad_cam(
    memory: Memory, slope: Memory, index: int, valid: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Tensor:
    """Return the Grad-CAM of an image, (H, W), not negative, float64 on the CPU.

    Args:
        memory, slope: the encoder's output and a gradient with respect to it.
        index: of the image in the batch.
        valid: rows and columns of each level that are not padding.
        size: (H, W) in pixels.
    """
    levels = []
    for features, slopes, (h, w) in zip(memory.maps(), slope.maps(), valid):
        weights = slopes[index, :, :h, :w].mean((1, 2))
        cam = torch.einsum("c,chw->hw", weights, features[index].detach()).relu()
        levels.append(on_image(cam, (h, w), size))
    return torch.stack(levels).mean(0).cpu().double()


def distributions(cams: Tensor) -> Tensor:
    """Return the maps (K, H, W) as distributions over the pixels, (K, H W), `EPSILON` of each uniform."""
    flat = cams.flatten(1)
    total = flat.sum(1, keepdim=True)
    uniform = 1 / flat.shape[1]
    shares = torch.where(total > 0, flat / torch.where(total > 0, total, 1.0), uniform)
    return (1 - EPSILON) * shares + EPSILON * uniform


def distances(cams: Tensor) -> Tensor:
    """Return KL(C_i || C_j) of all pairs of maps (K, H, W) in nats, (K, K)."""
    shares = distributions(cams)
    cross = -shares @ shares.log().T
    return (cross - cross.diagonal()[:, None]).clamp(min=0)  # rounding may go below


def average_distances(matrix: Tensor) -> Tensor:
    """Return the average distance of each auxiliary head, (K,), from the matrix (K + 1, K + 1) with DETR first."""
    both = matrix + matrix.T
    heads = len(matrix) - 1
    return both[1:, 0] / 2 if heads == 1 else both[1:, 1:].sum(1) / (2 * (heads - 1))


def _check_finite(cams: Tensor, names: Sequence[str], image_id: int) -> None:
    for cam, name in zip(cams, names):
        if not cam.isfinite().all():
            raise UserError(
                f"--analyse conflict: the map of head {name} on image id {image_id} is not finite; the weights of "
                "--resume come from a diverged run: give an earlier checkpoint"
            )


def read_result(path: Path) -> Result:
    """Return what an earlier analysis wrote.

    Raises:
        UserError: the file is something else, or was written with another `EPSILON`.
    """
    result = read_json(path, "conflict")
    try:
        complete = isinstance(result["label"], str) and list(result["averages"]) == result["heads"][1:] != []
        complete = complete and all(isinstance(value, float) for value in result["averages"].values())
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(
            f"--analyse_with: {path} has no complete averages; give conflict.json files as they were written"
        )
    if result.get("epsilon") != EPSILON:
        found = result.get("epsilon")
        raise UserError(f"--analyse_with: {path} was written with epsilon {found}, not {EPSILON}: analyse it again")
    return result


def table(results: Sequence[Result]) -> str:
    """Return the matrix of the first result, and the average distances of all, for the screen."""
    own = results[0]
    width = max(len(name) for name in (*own["heads"], "KL(row, column)"))
    lines = [" ".join([f"{'KL(row, column)':{width}}", *(f"{name:>11}" for name in own["heads"])])]
    for name, row in zip(own["heads"], own["matrix"]):
        lines.append(" ".join([f"{name:{width}}", *(f"{value:11.4f}" for value in row)]))
    for result in results:
        values = ", ".join(f"{name} {value:.4f}" for name, value in result["averages"].items())
        lines.append(f"average distance, {result['label']}: {values}")
    for name, missing in own["images_without_map"].items():
        if missing:
            lines.append(f"{name}: {missing} of {own['images']} images have a map of 0, taken as uniform")
    return "\n".join(lines)
