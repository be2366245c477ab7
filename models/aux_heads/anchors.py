"""Anchors, box deltas, IoU and assignment by maximal IoU: what the one-to-many heads share.

The conventions are those that the heads of Co-DETR were published with: anchors are centred on the corner of their
cell, not on its middle. Boxes are xyxy in pixels of the input image, batched and padded: nothing here asks the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ops.module import at_least_float32
from ops.transfer import send

Shapes = Sequence[tuple[int, int]]
EPS = 1e-6  # least union and least hull, in square pixels


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of every cell of a feature pyramid.

    One anchor per ratio (height / width) and scale, ratios outer. Its area is `(base size * scale)^2`; the base size
    of a level is its stride unless `base_sizes` says otherwise. Anchors are ordered by level, row, column, anchor.

    Raises:
        ValueError: if there is no scale or ratio, a number is not positive, or levels and base sizes do not fit.
    """

    strides: Sequence[int]
    _: KW_ONLY
    scales: Sequence[float]
    ratios: Sequence[float]
    base_sizes: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("strides", "scales", "ratios", "base_sizes"):
            values = getattr(self, name)
            values = tuple(self.strides if values is None else values)
            if not values or min(values) <= 0:
                raise ValueError(f"AnchorGrid needs at least one positive number as {name}, found {values}")
            object.__setattr__(self, name, values)  # tuples, so that a grid can be a key of the cache
        if len(self.base_sizes) != len(self.strides):
            raise ValueError(f"AnchorGrid has {len(self.strides)} strides, but {len(self.base_sizes)} base sizes")

    @property
    def per_cell(self) -> int:
        """Number of anchors of a cell."""
        return len(self.scales) * len(self.ratios)

    def level_counts(self, shapes: Shapes) -> list[int]:
        """Return the number of anchors of each level; `shapes` are the (h, w) of the maps."""
        return [h * w * self.per_cell for h, w in self._checked(shapes)]

    def anchors(self, shapes: Shapes, device: torch.device | str) -> Tensor:
        """Return the anchors (A, 4), float32; `shapes` are the (h, w) of the maps.

        The tensor is kept for the next batch of these shapes: do not change it in place.
        """
        return _anchors(self, self._checked(shapes), torch.device(device))

    def usable(self, shapes: Shapes, sizes: Shapes, device: torch.device | str) -> Tensor:
        """Return (B, A) bool: whether an anchor's cell begins inside its image.

        Args:
            shapes: (h, w) of the maps.
            sizes: (h, w) in pixels of each image; a level has `ceil(size / stride)` usable rows and columns.
        """
        limits = [[(-(-h // s), -(-w // s)) for s in self.strides] for h, w in sizes]  # rounded up
        limits = send(torch.tensor(limits), device)  # (B, levels, 2)
        masks = []
        for level, (h, w) in enumerate(self._checked(shapes)):
            rows = torch.arange(h, device=device) < limits[:, level, :1]
            columns = torch.arange(w, device=device) < limits[:, level, 1:]
            masks.append((rows[:, :, None] & columns[:, None, :]).flatten(1))
        return torch.cat(masks, 1).repeat_interleave(self.per_cell, 1)

    def cell_of(self, shapes: Shapes, device: torch.device | str) -> Tensor:
        """Return (A,) int64: the number of each anchor's cell among the cells of all levels."""
        cells = sum(h * w for h, w in self._checked(shapes))
        return torch.arange(cells, device=device).repeat_interleave(self.per_cell)

    def _checked(self, shapes: Shapes) -> tuple[tuple[int, int], ...]:
        """Return `shapes` as a key of the cache."""
        if len(shapes) != len(self.strides):
            raise ValueError(f"AnchorGrid has strides {self.strides}, but there are {len(shapes)} maps: {list(shapes)}")
        return tuple((int(h), int(w)) for h, w in shapes)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a cached tensor made while testing must still be good for training
def _anchors(grid: AnchorGrid, shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the anchors (A, 4) of a pyramid."""
    # In float32 from the start and in this order: low-quality matching depends on exact ties between IoUs.
    root = torch.tensor(grid.ratios, dtype=torch.float32).sqrt()[:, None]
    scales = torch.tensor(grid.scales, dtype=torch.float32)
    levels = []
    for stride, base, (h, w) in zip(grid.strides, grid.base_sizes, shapes):
        width, height = (base * (1 / root) * scales).flatten(), (base * root * scales).flatten()
        cell = send(0.5 * torch.stack([-width, -height, width, height], -1), device)
        y = torch.arange(h, dtype=torch.float32, device=device) * stride
        x = torch.arange(w, dtype=torch.float32, device=device) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        levels.append((torch.stack([x, y, x, y], -1)[:, :, None] + cell).view(-1, 4))
    return torch.cat(levels)


@dataclass(frozen=True)
class DeltaCoder:
    """Boxes as shifts of anchors (R-CNN, appendix C): dx, dy in anchor sizes, log dw, dh, each divided by its std."""

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Return the deltas (..., 4) that turn `anchors` into `boxes`, (..., 4) each or broadcast to it.

        Empty boxes (the padding of a batch) have finite deltas: a side counts at least 1e-6 pixels.
        """
        centre, size = _centre_and_size(anchors)
        goal, goal_size = _centre_and_size(boxes)
        size, goal_size = size.clamp(min=EPS), goal_size.clamp(min=EPS)
        deltas = torch.cat([(goal - centre) / size, (goal_size / size).log()], -1)
        return deltas / self._stds(deltas)

    def decode(self, anchors: Tensor, deltas: Tensor, *, clip: Tensor | None = None) -> Tensor:
        """Return the boxes (..., 4), at least float32, for `anchors` and `deltas`, (..., 4) each or broadcast to it.

        A box is at most 62.5 times wider or narrower than its anchor, so that the exponential stays finite.

        Args:
            clip: (h, w) of the image to which boxes are cut: (B, 2) for boxes (B, ..., 4), (2,) for one image.
        """
        deltas = at_least_float32(deltas)
        shift, stretch = (deltas * self._stds(deltas)).split(2, -1)
        bound = abs(math.log(16 / 1000))
        centre, size = _centre_and_size(anchors)
        centre, half = centre + shift * size, 0.5 * size * stretch.clamp(-bound, bound).exp()
        boxes = torch.cat([centre - half, centre + half], -1)
        return boxes if clip is None else clip_boxes(boxes, clip)

    def _stds(self, like: Tensor) -> Tensor:
        return send(torch.tensor(self.stds, dtype=like.dtype), like.device)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return centre (..., 2) and size (..., 2) of `boxes` (..., 4)."""
    first, last = boxes.split(2, -1)
    return 0.5 * (first + last), last - first


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Return `boxes` (B, ..., 4) cut to images of `sizes` (B, 2), (h, w) in pixels; (2,) for one image."""
    while sizes.dim() < boxes.dim():
        sizes = sizes.unsqueeze(-2)
    corner = sizes.flip(-1).to(boxes.dtype)  # (w, h)
    return torch.minimum(boxes.clamp(min=0), torch.cat([corner, corner], -1))


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both areas, (...), of boxes (..., 4); written by coordinate, which takes the least memory for pairs."""
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = a.unbind(-1), b.unbind(-1)
    inter = (torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)).clamp(min=0)
    inter = inter * (torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)).clamp(min=0)
    union = (right_a - left_a) * (bottom_a - top_a) + (right_b - left_b) * (bottom_b - top_b) - inter
    return inter, union.clamp(min=EPS)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (...) of the boxes `a` and `b`, (..., 4) each or broadcast to it; 0 for two empty boxes."""
    inter, union = _intersection_and_union(a, b)
    return inter / union


@torch.no_grad()
def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (B, A, M), without gradient, of all pairs of `a` (B, A, 4) and `b` (B, M, 4) of an image.

    Either may have a leading 1. This is the largest tensor of an assignment; a head with a million anchors may call
    it image by image.
    """
    return paired_iou(a[..., :, None, :], b[..., None, :, :])


def giou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Return 1 - GIoU (...) of the boxes `pred` and `target` (..., 4), finite for empty boxes too."""
    inter, union = _intersection_and_union(pred, target)
    hull = torch.maximum(pred[..., 2:], target[..., 2:]) - torch.minimum(pred[..., :2], target[..., :2])
    hull = hull.clamp(min=0).prod(-1).clamp(min=EPS)
    return 1 - inter / union + (hull - union) / hull


@torch.no_grad()
def assign_max_iou(
    iou: Tensor,
    valid: Tensor,
    usable: Tensor,
    *,
    positive: float,
    negative: float,
    min_positive: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign each box to the object that it overlaps most (Faster R-CNN, section 3.1.2).

    A box with a maximal IoU of at least `positive` is positive, below `negative` it is negative, between them it is
    ignored. With `low_quality` each object whose best IoU is at least `min_positive` takes all boxes that reach it
    exactly, away from other objects too; objects take them in order, so a later one keeps what both want.

    Args:
        iou: (B, A, M) of boxes and objects.
        valid: (B, M) bool, where there is an object.
        usable: (B, A) bool; other boxes are neither positive nor negative.

    Returns:
        target: (B, A) int64, object of a positive, 0 elsewhere.
        positive: (B, A) bool.
        negative: (B, A) bool.
    """
    iou = iou.masked_fill(~(valid[:, None, :] & usable[:, :, None]), -1.0)
    best, target = iou.max(-1)
    is_positive = best >= positive
    is_negative = best < negative
    if low_quality:
        reach = iou.amax(1)  # (B, M)
        wants = (iou == reach[:, None]) & (valid & (reach >= min_positive))[:, None] & usable[:, :, None]
        order = torch.arange(1, iou.shape[-1] + 1, dtype=torch.int32, device=iou.device)
        taken_by = torch.where(wants, order, 0).amax(-1)  # 0: by nobody
        taken = taken_by > 0
        target = torch.where(taken, taken_by.long() - 1, target)
        is_positive, is_negative = is_positive | taken, is_negative & ~taken
    is_positive, is_negative = is_positive & usable, is_negative & usable
    return torch.where(is_positive, target, 0), is_positive, is_negative
