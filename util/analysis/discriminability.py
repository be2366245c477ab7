"""How well encoder features, and the attention of the decoder, tell objects from background (Co-DETR, eqs. 7 and 8).

A map D in [0, 1] on the image is cut at thresholds S. IoF(S) is the share of the foreground, the union of the
annotated boxes, with D > S, and IoB(S) that of the background; the area under IoF over IoB is 1 for a map that tells
them apart and 0.5 for one that does not. The paper writes no formula for IoB; this reading makes the curve an ROC.

- Encoder: D is the channel norm of the encoder's output, divided by its maximum in the image, averaged over levels.
- Decoder: the same with the attention that the sampling points of positive queries give to each cell, in the last
  decoder layer, whose boxes are the detections, and with the pairs of that layer. All queries of training count:
  one-to-many and auxiliary ones too. Schemes that change with the epoch are as in the first one.

The paper does not say how images are averaged: both ways are written, the sums over all pixels are what is drawn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from util import dist
from util.analysis.attention import attention_of_positives, watch
from util.analysis.base import Subject, read_json
from util.analysis.discriminability_plot import Example, draw_curves, draw_examples
from util.analysis.maps import foreground, mean_of_levels, picture, valid_sizes
from util.errors import UserError

# Steps of 0.01, and finer ones towards 1, 50 in every tenfold approach: the encoder ends in a LayerNorm, so that norms
# differ little. After 4 epochs on synthetic images D was above 0.99 everywhere: an area of 0.50 with the even steps
# alone, in truth 0.28.
THRESHOLDS = sorted({k / 100 for k in range(101)} | {1 - 10 ** (-k / 50) for k in range(1, 251)})
EXAMPLES = 4  # images that are drawn
PARTS = ("encoder", "decoder")
Result = dict[str, Any]


class Curve:
    """Counts the pixels of images above every threshold."""

    def __init__(self) -> None:
        # Rows: foreground, background.
        self.above = torch.zeros(2, len(THRESHOLDS), dtype=torch.float64)
        self.pixels = torch.zeros(2, dtype=torch.float64)
        self.ratios = torch.zeros(2, len(THRESHOLDS), dtype=torch.float64)
        self.images = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor, mask: Tensor) -> None:
        """Count one image.

        Args:
            values: (H, W), D in [0, 1].
            mask: (H, W) bool, the foreground; without any the image counts in IoB only, all over it in IoF only.
        """
        thresholds = torch.tensor(THRESHOLDS, dtype=values.dtype, device=values.device)
        passed = torch.bucketize(values, thresholds)  # the number of thresholds below each value
        for row, part in enumerate((passed[mask], passed[~mask])):
            if part.numel():
                with_so_many = torch.bincount(part, minlength=len(THRESHOLDS) + 1)
                above = with_so_many.flip(0).cumsum(0).flip(0)[1:].cpu().double()
                self.above[row] += above
                self.pixels[row] += part.numel()
                self.ratios[row] += above / part.numel()
                self.images[row] += 1

    def result(self) -> Result:
        """Return IoF and IoB at the thresholds and the area, of all pixels together and as means of images.

        Raises:
            UserError: there was no foreground, or no background.
        """
        for count, what in zip(self.pixels.tolist(), ("lies in a box", "lies outside all boxes")):
            if count == 0:
                raise UserError(f"--analyse discriminability: no pixel of the validation images {what}")
        iof, iob = self.above / self.pixels[:, None]
        mean_iof, mean_iob = self.ratios / self.images[:, None]
        return {
            "area": area(iof, iob),
            "iof": iof.tolist(),
            "iob": iob.tolist(),
            "mean_area": area(mean_iof, mean_iob),
            "mean_iof": mean_iof.tolist(),
            "mean_iob": mean_iob.tolist(),
        }


def area(iof: Tensor, iob: Tensor) -> float:
    """Return the area under IoF over IoB, both falling, by trapezoids, with the end points (0, 0) and (1, 1)."""
    zero, one = iof.new_zeros(1), iof.new_ones(1)
    x, y = (torch.cat([one, values, zero]).flip(0) for values in (iob, iof))
    return torch.trapezoid(y, x).item()


def analyse_discriminability(subject: Subject) -> list[Path]:
    """Write `discriminability.json` and, with matplotlib, `discriminability.png` and `discriminability_examples.png`.

    Raises:
        UserError: the images have no object or no background, a map is not finite, or a file of `subject.others` is
            not such a .json file.
    """
    others = [read_result(path) for path in subject.others]
    result, examples = measure(subject)
    path = subject.folder / "discriminability.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    results = [result, *others]
    dist.info(table(results))
    try:
        written = draw_curves(results, PARTS, subject.folder / "discriminability.png")
        drawn = draw_examples(examples, PARTS, subject.folder / "discriminability_examples.png")
    except UserError as error:
        dist.info(f"no pictures: {error}")
        return [path]
    return [path, written, drawn]


@torch.no_grad()
def measure(subject: Subject) -> tuple[Result, list[Example]]:
    """Return what the .json file holds, and the first images with their maps."""
    subject.train_without_chance()
    curves = {part: Curve() for part in PARTS}
    images_seen = empty = objects = 0
    queries: Counter[str] = Counter()
    examples: list[Example] = []
    for images, targets in subject.batches("discriminability"):
        with watch(subject.model) as seen:
            output = subject.model(images, targets)
        norms = [level.float().norm(dim=1) for level in seen.memory.maps()]
        attention, chosen = attention_of_positives(output, seen, subject.criterion, targets)
        queries.update({name: int(found.sum()) for name, found in chosen.items()})
        any_positive = torch.stack([found.any(1) for found in chosen.values()]).any(0).tolist()
        for i, (target, size, valid) in enumerate(zip(targets, images.sizes, valid_sizes(seen.memory))):
            mask = foreground(target.boxes, size)
            maps = {"encoder": mean_of_levels([level[i] for level in norms], valid, size)}
            if any_positive[i]:  # else there is no attention to draw a map of
                maps["decoder"] = mean_of_levels([level[i] for level in attention], valid, size)
            for part, values in maps.items():
                _check_finite(values, part, target.image_id)
                curves[part].add(values, mask)
            if len(examples) < EXAMPLES:
                shown = {part: values.cpu() for part, values in maps.items()}
                examples.append(Example(target.image_id, picture(images, i), target.boxes.cpu(), shown))
            images_seen, empty, objects = images_seen + 1, empty + (len(target) == 0), objects + len(target)
    result = {
        "analysis": "discriminability",
        "label": subject.label,
        "images": images_seen,
        "images_without_objects": empty,
        "objects": objects,
        "positive_queries": dict(queries),  # by set
        "positives_per_object": queries.total() / max(objects, 1),
        "thresholds": THRESHOLDS,
    }
    return result | {part: curve.result() for part, curve in curves.items()}, examples


def _check_finite(values: Tensor, part: str, image_id: int) -> None:
    if not values.isfinite().all():
        raise UserError(
            f"--analyse discriminability: the {part} map of image id {image_id} is not finite; the weights of --resume "
            "come from a diverged run: give an earlier checkpoint"
        )


def read_result(path: Path) -> Result:
    """Return what an earlier analysis wrote.

    Raises:
        UserError: the file is something else.
    """
    result = read_json(path, "discriminability")
    try:
        complete = isinstance(result["label"], str) and isinstance(result["positives_per_object"], float)
        for part in PARTS:
            lengths = {len(result[part][name]) for name in ("iof", "iob")} | {len(result["thresholds"])}
            complete = complete and len(lengths) == 1 and isinstance(result[part]["area"], float)
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(
            f"--analyse_with: {path} has no complete curves; give discriminability.json files as they were written"
        )
    return result


def table(results: Sequence[Result]) -> str:
    """Return the areas under the curves as a small table, one row per detector."""
    title = "area under the curve"
    width = max(len(title), *(len(result["label"]) for result in results))
    lines = [f"{title:{width}}  encoder  decoder  positives/object"]
    for result in results:
        areas = "  ".join(f"{result[part]['area']:7.3f}" for part in PARTS)
        lines.append(f"{result['label']:{width}}  {areas}  {result['positives_per_object']:16.2f}")
    return "\n".join(lines)
