"""Hungarian matching of all sets and layers of a step with one copy to the host (DETR, section 3.1; H-DETR, 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.assign.costs import class_cost, giou_cost, l1_cost
from util.boxes import cxcywh_to_xyxy
from util.structures import Assignment, FlatTargets, Predictions, Supervision

UNMATCHABLE = 1e6  # stands for a non-finite cost: far above any real one, small enough to keep sums exact
COSTS_AT_ONCE = 2**23  # entries that are computed together; bounds the memory of crowded batches


@dataclass
class Request:
    """Slots of some predictions that want targets.

    Requests with the same `predictions` and `targets` are different parts of them; their costs are computed together.
    """

    name: str  # of the set, for messages
    predictions: Predictions
    targets: FlatTargets  # labels already 0 where the supervision is class-agnostic
    supervision: Supervision
    rows: Sequence[int] | None = None  # layers of `predictions` that are meant; None = all
    slots: slice = field(default_factory=lambda: slice(None))
    layers: Sequence[int] | None = None  # their numbers in the decoder; None = the same
    time: float | None = None  # epochs trained so far, with the finished share of the present one; None = all

    def __post_init__(self) -> None:
        self.rows = range(self.predictions.layers) if self.rows is None else self.rows
        self.layers = self.rows if self.layers is None else self.layers
        self.slots = slice(*self.slots.indices(self.predictions.logits.shape[2]))


class HungarianMatcher:
    """Optimal one-to-one matching; with `repeat` k a target may be matched up to k times (one-to-many of H-DETR).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three terms of the cost.
        giou_eps: added to the denominators of the GIoU.
    """

    def __init__(
        self, *, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0, giou_eps: float = 0.0
    ) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all matching costs are 0: give at least one of class, bbox, giou a weight")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.giou_eps = giou_eps

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Assignment]:
        """Match every request on all its layers.

        The costs of all sets, layers and images are computed on the device, once for all requests that share their
        predictions, and copied to the host together. Copies of a target exist in the solver only.

        Returns:
            For each request min(N, k M) pairs per layer and image, slots ascending, layers and slots counted in
            `predictions`, targets in their image.
        """
        keys = [(id(r.predictions), id(r.targets)) for r in requests]
        different = dict(zip(keys, requests))
        costs = _to_host([self.costs(r.predictions, r.targets) for r in different.values()])
        by_key = dict(zip(different, costs))
        return _to_device(requests, [_solve(r, by_key[key]) for r, key in zip(requests, keys)])

    def costs(self, predictions: Predictions, targets: FlatTargets) -> Tensor:
        """Return what it costs to give a target to a slot of its image, (M, L, N) float32: no padding, no loop."""
        entries = predictions.layers * predictions.logits.shape[2]
        step = max(COSTS_AT_ONCE // max(entries, 1), 1)
        parts = [slice(i, i + step) for i in range(0, max(len(targets.labels), 1), step)]
        boxes = predictions.boxes.float()
        # The coordinate comes first in memory: whole planes are faster than every fourth number.
        planes = torch.cat([boxes, cxcywh_to_xyxy(boxes)], -1).permute(3, 1, 0, 2).contiguous()
        return torch.cat([self._costs(predictions.logits, planes, targets, part) for part in parts])

    def _costs(self, logits: Tensor, planes: Tensor, targets: FlatTargets, part: slice) -> Tensor:
        image = targets.image[part]
        logits = logits[:, image, :, targets.labels[part]].float()
        boxes, corners = planes[:, image].movedim(0, -1).split(4, dim=-1)
        own = targets.boxes[part, None, None].float()
        return (
            self.cost_class * class_cost(logits)
            + self.cost_bbox * l1_cost(boxes, own)
            + self.cost_giou * giou_cost(corners, cxcywh_to_xyxy(own), self.giou_eps)
        )


def _solve(request: Request, costs: np.ndarray) -> np.ndarray:
    """Return the pairs of one request, (4, P) int64: layer, image, slot, target."""
    pairs = [np.empty((4, 0), np.int64)]
    for image, own in _by_image(costs, request.targets.sizes):
        for row, layer in zip(request.rows, request.layers):
            where = f"set {request.name}, layer {layer}, image id {request.targets.image_ids[image]}"
            cost = _finite(own[:, row, request.slots], where)
            slots, columns = match(cost, repeat=request.supervision.repeat, block=request.supervision.block)
            found = np.empty((4, len(slots)), np.int64)
            found[0], found[1], found[2], found[3] = row, image, slots + request.slots.start, columns
            pairs.append(found)
    return np.concatenate(pairs, 1)


def _by_image(costs: np.ndarray, sizes: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each image that has targets and the rows of its targets."""
    start = 0
    for image, size in enumerate(sizes):
        if size:
            yield image, costs[start : start + size]
        start += size


def match(cost: np.ndarray, *, repeat: int = 1, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots (ascending) and targets of the cheapest matching of one image and layer.

    Args:
        cost: (M, N) of targets and slots, finite.
        repeat: how many slots a target may get in a block.
        block: size of the parts that the slots are cut into, each matched on its own; the last one may be smaller.
    """
    targets, width = cost.shape
    slots, columns = [], []
    for first in range(0, width, block or max(width, 1)):
        # The same list k times, one after the other: t1 t2 t3 t1 t2 t3, as published.
        part = cost[:, first : first + (block or width)]
        rows, found = linear_sum_assignment(np.tile(part, (repeat, 1)))
        order = found.argsort()
        slots.append(found[order] + first)
        columns.append(rows[order] % targets)
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *slots]), np.concatenate([empty, *columns])


def _to_host(blocks: Sequence[Tensor]) -> list[np.ndarray]:
    """Copy all `blocks` to the host together."""
    if not blocks:
        return []
    flat = torch.cat([b.flatten() for b in blocks]).cpu().numpy()
    parts = np.split(flat, np.cumsum([b.numel() for b in blocks])[:-1])
    return [part.reshape(tuple(block.shape)) for part, block in zip(parts, blocks)]


def _to_device(requests: Sequence[Request], solved: list[np.ndarray]) -> list[Assignment]:
    """Send the pairs of all requests back in one copy."""
    if not requests:
        return []
    device = requests[0].predictions.logits.device
    flat = torch.from_numpy(np.concatenate(solved, 1))
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    assignments = []
    for request, pairs in zip(requests, flat.split([s.shape[1] for s in solved], dim=1)):
        supervision = request.supervision
        # Not times the blocks: the losses of blocks add up, each a mean over its targets (H-TransTrack).
        targets = sum(request.targets.sizes) * supervision.repeat
        matched = pairs.shape[1] / max(len(request.rows), 1)
        count = targets if supervision.count == "targets" else matched
        assignments.append(Assignment(*pairs, count=float(count)))
    return assignments


def _finite(cost: np.ndarray, where: str) -> np.ndarray:
    """Return `cost` with non-finite entries replaced, so that the step can name its guilty loss term and go on."""
    good = np.isfinite(cost)
    if good.all():
        return cost
    warnings.warn(
        f"{(~good).sum()} of {cost.size} matching costs are not finite ({where}): the predictions are NaN or infinite",
        stacklevel=2,
    )
    return np.where(good, cost, UNMATCHABLE)
