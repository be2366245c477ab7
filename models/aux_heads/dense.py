"""What the dense auxiliary heads share: two towers, flat outputs of all levels, sums by level, detection.

Everything that belongs to one anchor (or point) of a batch is laid out (B, R, ...): level, row, column, anchor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from models.aux_heads.anchors import AnchorGrid
from models.aux_heads.base import AuxHead, Objects, Pyramid
from ops.module import at_least_float32
from util.structures import Detections

PRIOR = 0.01  # probability of every class at the start (RetinaNet, section 4.1)
LEAST_IOU = 1e-6  # an object takes its best anchors whatever their IoU; one that touches no anchor would take them all


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm(32) if asked for, ReLU; without norm the convolution has a bias."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.gn = nn.GroupNorm(32, width) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x if self.gn is None else self.gn(x)).relu()


class Scale(nn.Module):
    """A learned factor, 1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def tower(width: int, depth: int, *, norm: bool) -> nn.Sequential:
    """Return `depth` convolution blocks; parameters are `{i}.conv`, `{i}.gn`."""
    return nn.Sequential(*[ConvBlock(width, norm=norm) for _ in range(depth)])


def predictor(width: int, outputs: int) -> nn.Conv2d:
    """Return the 3x3 convolution at the end of a tower."""
    return nn.Conv2d(width, outputs, 3, padding=1)


class DenseHead(AuxHead):
    """A tower for classes and one for boxes, the same on every level; what they predict is up to the subclass.

    A subclass calls this constructor, adds its predictors, and then calls `initialise`.
    Parameter names are those of published checkpoints after `bbox_head.0.`.

    Args:
        num_classes: C.
        width: D, channels of pyramid and towers; with norm a multiple of 32.
        grid: the anchors, and with them the strides of the pyramid.
        stacked_convs: convolutions of each tower.
        norm: GroupNorm in the towers.
    """

    def __init__(self, *, num_classes: int, width: int, grid: AnchorGrid, stacked_convs: int, norm: bool) -> None:
        super().__init__()
        self.num_classes, self.grid = num_classes, grid
        self.cls_convs = tower(width, stacked_convs, norm=norm)
        self.reg_convs = tower(width, stacked_convs, norm=norm)

    def initialise(self, classifier: nn.Conv2d) -> None:
        """Draw every convolution from N(0, 0.01^2), biases 0; `classifier` begins at the prior."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(classifier.bias, -math.log((1 - PRIOR) / PRIOR))

    def towers(self, pyramid: Pyramid) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features for classes and those for boxes, (B, D, h, w) of each level.

        Raises:
            ValueError: if the pyramid has other strides than the head.
        """
        if tuple(pyramid.strides) != self.grid.strides:
            name, strides = type(self).__name__, self.grid.strides
            raise ValueError(f"{name} was built for strides {strides}, the pyramid has {pyramid.strides}")
        return [self.cls_convs(x) for x in pyramid.maps], [self.reg_convs(x) for x in pyramid.maps]

    def place(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, list[int]]:
        """Return the anchors (R, 4), which of them are usable (B, R), and their number on each level."""
        shapes, device = pyramid.shapes, pyramid.maps[0].device
        usable = self.grid.usable(shapes, pyramid.usable, device)
        return self.grid.anchors(shapes, device), usable, self.grid.level_counts(shapes)


def flatten(maps: Sequence[Tensor], numbers: int) -> Tensor:
    """Lay the outputs of all levels flat: maps (B, A * numbers, h, w) become (B, R, numbers), at least float32."""
    flat = [m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, numbers) for m in maps]
    return at_least_float32(torch.cat(flat, 1))


def strides_of(strides: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the stride of each of R anchors, (R,) float32; `counts` are the anchors of each level."""
    return torch.cat([torch.full((n,), float(s), device=device) for s, n in zip(strides, counts)])


def sum_by_level(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sum `values` (B, R, ...) over everything but the level: (levels,)."""
    return torch.stack([part.sum() for part in values.split(list(counts), dim=1)])


def one_hot(labels: Tensor, positive: Tensor, num_classes: int) -> Tensor:
    """Return (B, R, C) float32: 1 at the label (B, R) of each positive, 0 elsewhere.

    Labels are below C; `torch.nn.functional.one_hot` would ask the device whether they are.
    """
    target = torch.zeros(*labels.shape, num_classes, device=labels.device)
    return target.scatter_(2, labels[..., None], positive[..., None].float())


def objects_of(target: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """Return labels (B, R) and boxes (B, R, 4) of the objects that `target` (B, R) names."""
    return objects.labels.gather(1, target), objects.boxes.gather(1, target[..., None].expand(-1, -1, 4))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Return how far the sides of `boxes` (..., 4), left, top, right, bottom, are from `points` (..., 2).

    Negative where a point is outside.
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def box_around(points: Tensor, sides: Tensor) -> Tensor:
    """Return the boxes (..., 4) whose sides are `sides` (..., 4), left, top, right, bottom, away from `points`."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], -1)


@torch.no_grad()
def detect(
    scores: Tensor,
    boxes: Tensor,
    counts: Sequence[int],
    pyramid: Pyramid,
    *,
    quality: Tensor | None = None,
    nms_iou: float,
    per_level: int = 1000,
    topk: int = 100,
) -> list[Detections]:
    """Return the detections of each image, best first. Waits for the device: NMS decides how many there are.

    Of each level the `per_level` best (anchor, class) pairs by class score alone go on; then the score is multiplied by
    `quality`, and NMS within each class keeps at most `topk`.

    Args:
        scores: (B, R, C) class probabilities.
        boxes: (B, R, 4) in pixels, clipped here.
        counts: anchors of each level, R in all.
        pyramid: gives the sizes of the images.
        quality: (B, R) probability that a box is well placed; None = 1.
        nms_iou: a box that overlaps a better one of its class by more is dropped.
    """
    num_classes = scores.shape[-1]
    chosen, first = [], 0
    for level in scores.split(list(counts), dim=1):
        pairs = level.flatten(1)
        chosen.append(pairs.topk(min(per_level, pairs.shape[1]))[1] + first * num_classes)
        first += level.shape[1]
    pair = torch.cat(chosen, 1)
    anchor, label = pair // num_classes, pair % num_classes
    score = scores.flatten(1).gather(1, pair)
    if quality is not None:
        score = score * quality.gather(1, anchor)
    box = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))
    found = []
    for image, size in enumerate(pyramid.sizes):
        clipped = clip_boxes_to_image(box[image], size)
        kept = batched_nms(clipped, score[image], label[image], nms_iou)[:topk]
        found.append(Detections(score[image][kept], label[image][kept], clipped[kept]))
    return found
