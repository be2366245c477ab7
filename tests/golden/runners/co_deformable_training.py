"""Co-DETR, a training step: what every head assigns and samples, its queries, losses, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchvision.ops import box_convert

from models.assign import Request
from models.aux_heads.atss import ATSSHead
from models.aux_heads.base import AuxHead, AuxOutput, Objects, Pyramid
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.rpn import Proposals
from models.criterion import Criterion, loss_name
from models.detector import Detector
from models.groups.positives import Chosen
from tests.golden.runners.co_stored import BOX_PIXELS, Stored, subsample
from tests.golden.runners.common import assert_relative
from util.checkpoint import native_weights
from util.structures import Assignment, FlatTargets, ImageBatch, LossReport, QueryGroup, SupervisedSet, Target

LOSS, GRADIENT = 2e-4, 5e-3  # allowed relative differences, of the stored `tolerances`
EMBEDS = "query_head.transformer.head_pos_embed.weight"
TERMS = {"loss_ce": "loss_cls", "loss_bbox": "loss_bbox", "loss_giou": "loss_iou"}  # our names, published names


@dataclass
class Watched:
    """What the parts of the scheme were given and gave during a forward pass."""

    heads: dict[str, tuple[Pyramid, Objects, AuxOutput]] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)  # (B, n, D) of the queries of each head
    groups: list[QueryGroup] = field(default_factory=list)


def check_training(
    model: Detector, criterion: Criterion, images: ImageBatch, step: dict, stored: Stored, names: Mapping[str, str]
) -> None:
    """Compare one training step.

    Args:
        step: objects and numbers of the step.
        stored: its arrays.
        names: our name of each published parameter, see `own_names`.
    """
    targets = [_target(t, size, i) for i, (t, size) in enumerate(zip(step["targets"], images.sizes))]
    model.train()
    with _watch(model) as watched:
        output = model(images, targets)
    with _watch_matching(criterion) as matched:
        report = criterion(output, targets)
    check_matching(matched, len(targets), stored)
    for name, (pyramid, objects, _) in watched.heads.items():
        CHECKS[name](model.groups["co"].heads[name], pyramid, objects, stored)
    for index, group in enumerate(watched.groups):
        check_queries(index, group, watched.features[index], targets, output.sets, stored)
    check_losses(published_losses(report, watched, model), step, report.total)
    if step.get("grad_norms"):
        check_gradients(model, report.total, step["grad_norms"], names)


def own_names(state: Mapping[str, Tensor], model: Detector) -> dict[str, str]:
    """Return one name of a parameter of `model` for each published name of `state` that has one.

    The state is converted with numbers in place of its tensors; they tell where each went.
    """
    marks = {official: torch.tensor(float(i)).expand(v.shape) for i, (official, v) in enumerate(state.items(), start=1)}
    published = dict(enumerate(marks, start=1))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    native = {own: int(m.flatten()[0]) for own, m in native_weights(marks, "names").items() if own in parameters}
    return {published[number]: own for own, number in native.items() if number}  # 0: biases that no file holds


def _target(step: dict, size: tuple[int, int], image_id: int) -> Target:
    height, width = size
    boxes = torch.tensor(step["boxes"]).view(-1, 4) / torch.tensor((width, height, width, height))
    labels = torch.tensor(step["labels"], dtype=torch.int64)
    return Target(labels, box_convert(boxes, "xyxy", "cxcywh"), image_id, size, size)


@contextmanager
def _watch(model: Detector) -> Iterator[Watched]:
    seen, co = Watched(), model.groups["co"]
    handles: list[RemovableHandle] = []

    def watch(module: nn.Module, note: Callable) -> None:
        handles.append(module.register_forward_hook(note))

    def note_head(head: AuxHead, inputs: tuple, output: AuxOutput) -> None:
        seen.heads[head.name] = (*inputs, output)

    for head in co.heads.values():
        watch(head, note_head)
    embed = co.queries.embed

    def note_features(head: str, chosen: Chosen, sizes: Sequence[tuple[int, int]]) -> tuple:
        seen.features[len(seen.features)] = chosen.features
        return embed(head, chosen, sizes)

    watch(co, lambda module, inputs, output: seen.groups.extend(output))
    try:
        with patch.object(co.queries, "embed", note_features):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_matching(criterion: Criterion) -> Iterator[dict[str, tuple[Request, Assignment]]]:
    matched: dict[str, tuple[Request, Assignment]] = {}
    roles = dict(criterion.assigners)
    original = roles["queries"]

    def watching(requests: Sequence[Request]) -> list[Assignment]:
        found = original(requests)
        matched.update({r.name: (r, a) for r, a in zip(requests, found)})
        return found

    criterion.assigners.update(dict.fromkeys(roles, watching))
    try:
        yield matched
    finally:
        criterion.assigners.update(roles)


def check_matching(matched: dict[str, tuple[Request, Assignment]], images: int, stored: Stored) -> None:
    """Compare the pairs of the decoder layers and, in two-stage, of the encoder's tokens; queries ascend in both."""
    for name, (request, found) in matched.items():
        for layer in request.rows:
            for image in range(images):
                here = (found.layer == layer) & (found.image == image)
                pairs = torch.stack([found.slot[here] - request.slots.start, found.target[here]])
                pairs = pairs[:, pairs[0].argsort()]
                stored.same(f"match.{f'd{layer}' if name == 'one2one' else 'enc'}.{image}", pairs)


@torch.no_grad()
def check_atss(head: ATSSHead, pyramid: Pyramid, objects: Objects, stored: Stored) -> None:
    """Compare the maps of all levels and the positive anchors."""
    counts = head.grid.level_counts(pyramid.shapes)
    logits, deltas, centerness = head.outputs(pyramid)
    for name, values in (("cls", logits), ("reg", deltas), ("ctr", centerness[..., None])):
        for level, (part, shape) in enumerate(zip(values.split(counts, dim=1), pyramid.shapes)):
            maps = part.unflatten(1, shape).permute(0, 3, 1, 2)
            stored.close(f"atss.{name}{level}_sub", subsample(maps, 1500))
    samples = head(pyramid, objects).samples
    for i, (positive, target) in enumerate(zip(samples.positive, samples.target)):
        stored.same(f"atss.pos{i}", positive.nonzero()[:, 0])
        stored.same(f"atss.pos_labels{i}", objects.labels[i, target[positive]])
        stored.close(f"atss.pos_anchors{i}", samples.boxes[i, positive])
        stored.close(f"atss.pos_targets{i}", objects.boxes[i, target[positive]])
    stored.same("atss.num_total_pos", samples.positive.sum(1).clamp(min=1).sum())


@torch.no_grad()
def check_faster_rcnn(head: FasterRCNNHead, pyramid: Pyramid, objects: Objects, stored: Stored) -> None:
    """Compare what both stages sample, the proposals between them, and what the second stage says."""
    rpn, roi = head.rpn, head.roi
    picked, target = rpn.choose(pyramid, objects)
    among_usable = rpn.grid.usable(pyramid.shapes, pyramid.usable, "cpu").cumsum(1) - 1
    _, proposals = rpn(pyramid, objects)
    for i in range(len(objects.counts)):
        stored.same(f"rpn.pos{i}", among_usable[i, picked.index[i, picked.positive[i]]])
        stored.same(f"rpn.neg{i}", among_usable[i, picked.index[i, picked.negative[i]]])
        stored.same(f"rpn.pos_gt{i}", target[i, picked.positive[i]])
    _check_proposals(head, pyramid, proposals, stored)
    boxes, picked, target = roi.choose(objects, proposals)
    for i, taken in enumerate(picked.taken):
        stored.close(f"roi.boxes{i}", boxes[i, taken], BOX_PIXELS)
        stored.same(f"roi.num_pos{i}", picked.positive[i].sum())
        stored.same(f"roi.pos_gt{i}", target[i, picked.positive[i]])
    for name, values in zip(("cls", "reg", "feat"), roi.classify(pyramid, boxes)):
        stored.close(f"roi.{name}_sub", subsample(values[picked.taken]))


CHECKS = {"atss": check_atss, "faster_rcnn": check_faster_rcnn}


def _check_proposals(head: FasterRCNNHead, pyramid: Pyramid, proposals: Proposals, stored: Stored) -> None:
    """Boxes in order; the stored score of each belongs to an anchor that gives this box."""
    rpn = head.rpn
    logits, deltas = rpn.score(pyramid)
    anchors, sizes = rpn.grid.anchors(pyramid.shapes, "cpu"), torch.tensor(pyramid.sizes)
    decoded, scores = rpn.coder.decode(anchors, deltas, clip=sizes), logits.sigmoid()
    for i in range(len(sizes)):
        want = torch.from_numpy(stored.take(f"rpn.proposals{i}"))
        ours = proposals.boxes[i, proposals.valid[i]]
        assert len(ours) == len(want), f"rpn.proposals{i}: {len(ours)}, stored {len(want)}"
        assert (ours - want[:, :4]).abs().max() <= BOX_PIXELS, f"rpn.proposals{i}: other boxes or another order"
        same_box = ((decoded[i] - want[:, None, :4]).abs() <= BOX_PIXELS).all(-1)
        same_score = (scores[i] - want[:, 4:]).abs() <= 1e-4
        assert (same_box & same_score).any(1).all(), f"rpn.proposals{i}: no anchor gives a stored box and its score"


def check_queries(
    index: int,
    group: QueryGroup,
    features: Tensor,
    targets: Sequence[Target],
    sets: Mapping[str, SupervisedSet],
    stored: Stored,
) -> None:
    """Compare the queries of a head, what each is taught, and what the decoder makes of them."""
    found = sets[group.name].predictions
    (supervision,) = group.supervision
    pairs, flat = supervision.assign, FlatTargets.of(targets)
    assert pairs.ignore is None and pairs.weight is None and group.padding is None, "every query is taught in full"
    stored.close(f"aux{index}.coords", group.reference)
    stored.close(f"aux{index}.feats_sub", subsample(features))
    stored.close(f"aux{index}.label_w", torch.ones(group.reference.shape[:2]))
    for layer in range(found.layers):
        here = pairs.layer == layer
        image, slot, target = pairs.image[here], pairs.slot[here], pairs.target[here]
        objects = flat.starts[image] + target
        labels = torch.full(group.reference.shape[:2], found.logits.shape[-1])  # background
        boxes, weights = torch.zeros_like(group.reference), torch.zeros_like(group.reference)
        labels[image, slot], boxes[image, slot], weights[image, slot] = flat.labels[objects], flat.boxes[objects], 1.0
        stored.same(f"aux{index}.labels", labels)
        stored.close(f"aux{index}.targets", boxes)
        stored.close(f"aux{index}.box_w", weights)
    stored.close(f"aux{index}.out_box", found.boxes)
    stored.close(f"aux{index}.out_cls_sub", subsample(found.logits, 8000))


def published_losses(report: LossReport, watched: Watched, model: Detector) -> dict[str, list[float]]:
    """Return our losses, weighted, under the published names; those of a head by level where it tells them apart."""
    last = len(model.transformer.decoder.layers) - 1
    sets = {"one2one": "{}", "dn": "dn_{}"} | {f"co_{name}": f"{{}}_aux{k}" for k, name in enumerate(watched.heads)}
    proposals = model.transformer.proposals_name
    ours = {loss_name(term, proposals, 0, 0): f"enc_{theirs}" for term, theirs in TERMS.items()}
    for name, pattern in sets.items():
        for layer in range(last + 1):
            prefix = "" if layer == last else f"d{layer}."
            ours |= {loss_name(term, name, layer, last): prefix + pattern.format(TERMS[term]) for term in TERMS}
    result: dict[str, list[float]] = {}
    for name, weight in report.weights.items():
        if name in ours:
            result[ours[name]] = [weight * report.terms[name].item()]
    scale = model.groups["co"].loss_scale
    of_heads = {}
    for k, (name, (_, _, output)) in enumerate(watched.heads.items()):
        for term, values in output.losses.items():
            result[term if term.startswith("loss_rpn") else f"{term}{k}"] = (scale * values).reshape(-1).tolist()
            of_heads[f"{term}_{name}"] = scale * values.sum()
        result |= {f"{key}{k}": [report.terms[f"{key}_{name}"].item()] for key in output.logs}
    for name, value in of_heads.items():
        assert report.weights[name] == 1, name
        assert_relative(name, report.terms[name], value.item(), 1e-6)
    unknown = set(report.weights) - set(ours) - set(of_heads)
    assert not unknown, f"losses that the published model does not have: {sorted(unknown)}"
    return result


def check_losses(ours: dict[str, list[float]], step: dict, total: Tensor) -> None:
    """Compare every loss, those of heads level by level, and their sum."""
    assert ours.keys() == step["losses"].keys(), f"other losses: {sorted(ours.keys() ^ step['losses'].keys())}"
    for name, want in step["losses"].items():
        want = want if isinstance(want, list) else [want]
        assert len(ours[name]) == len(want), f"{name}: {len(ours[name])} levels, stored {len(want)}"
        for level, (a, b) in enumerate(zip(ours[name], want)):
            assert_relative(f"{name}, entry {level}", a, b, LOSS)
    if "total_loss" in step:
        assert_relative("total", total, step["total_loss"], LOSS)


def check_gradients(
    model: Detector, total: Tensor, norms: Mapping[str, float | None], names: Mapping[str, str]
) -> None:
    """Compare the norm of the gradient of every published parameter; `None` = no gradient arrives."""
    model.zero_grad()
    total.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for official, want in norms.items():
        gradient = parameters[names[official]].grad if official in names else None
        if official == EMBEDS:  # a table there, a vector for each head here
            gradient = torch.stack([p.grad for n, p in parameters.items() if ".head_pos_embed." in n])
        assert (gradient is None) == (want is None), f"{official}: gradient {gradient is not None}, stored {want}"
        if want is not None:
            assert_relative(f"gradient of {official}", gradient.norm(), want, GRADIENT)
