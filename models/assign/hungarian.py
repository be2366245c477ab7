"""Hungarian matching of all sets and layers of a step at once (DETR, section 3.1; H-DETR, 3.2).

How many pairs each problem has is known on the host: the flat pairs of a step always have the same shape for the same
numbers of objects. So on a GPU the costs, the solver and the pairs stay on the device and nobody waits for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.assign.costs import class_cost, giou_cost, l1_cost
from ops.assignment import FIELDS, gpu_solver_ready, number_of_pairs, solve, solve_on_gpu
from ops.pair_cost import pair_costs, pair_costs_ready
from ops.transfer import send
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
        predictions, and solved there together. Without a solver on the device they are copied to the host together:
        one wait. Copies of a target exist in the solver only.

        A cost that is not finite counts as `UNMATCHABLE`. On the host the problems that have some are named in a
        warning; the loss, which is mostly not finite then either, speaks for itself on a GPU.

        Returns:
            For each request min(N, k M) pairs per layer and image, slots ascending, layers and slots counted in
            `predictions`, targets in their image.
        """
        if not requests:
            return []
        keys = [(id(r.predictions), id(r.targets)) for r in requests]
        different = dict(zip(keys, requests))
        blocks = [self.costs(r.predictions, r.targets).flatten() for r in different.values()]
        costs = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        start = dict(zip(different, accumulate((len(block) for block in blocks), initial=0)))
        problems = [_problems(r, start[key]) for r, key in zip(requests, keys)]
        find = _pairs_on_gpu if gpu_solver_ready(costs.device) else _pairs_by_host
        return _assignments(problems, find(costs, problems))

    def costs(self, predictions: Predictions, targets: FlatTargets) -> Tensor:
        """Return what it costs to give a target to a slot of its image, (M, L, N) float32: no padding, no loop."""
        if pair_costs_ready(predictions.logits.device):
            return pair_costs(
                predictions.logits,
                predictions.boxes,
                targets.labels.long(),  # plain indexing takes int32 too
                targets.boxes.float(),
                targets.image,
                class_weight=self.cost_class,
                l1_weight=self.cost_bbox,
                giou_weight=self.cost_giou,
                giou_eps=self.giou_eps,
            )
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


@dataclass
class _Problems:
    """The assignment problems of a request, one per image with targets, layer and block of slots."""

    request: Request
    table: np.ndarray  # (P, 5) as `ops.assignment.solve` wants them
    image: np.ndarray  # (P,)
    layer: np.ndarray  # (P,) index into request.rows
    first: np.ndarray  # (P,) first slot

    @property
    def places(self) -> np.ndarray:
        """(3, P): the layer in `request.predictions`, the image and the first slot of each problem."""
        return np.stack([np.array(self.request.rows, np.int64)[self.layer], self.image, self.first])

    def describe(self, index: int) -> str:
        r, layer = self.request, self.request.layers[self.layer[index]]
        return f"set {r.name}, layer {layer}, image id {r.targets.image_ids[self.image[index]]}"


def _problems(request: Request, start: int) -> _Problems:
    """Return the problems of `request`, whose costs (M, L, N) begin at `start`."""
    layers, _, slots, _ = request.predictions.logits.shape
    own, supervision = request.slots, request.supervision
    sizes = np.array(request.targets.sizes, np.int64)
    block = supervision.block or max(own.stop - own.start, 1)
    image, layer, first = (
        part.flatten()
        for part in np.meshgrid(
            sizes.nonzero()[0], np.arange(len(request.rows)), np.arange(own.start, own.stop, block), indexing="ij"
        )
    )
    table = np.empty((len(image), len(FIELDS)), np.int64)
    row = np.array(request.rows, np.int64)[layer]
    table[:, 0] = start + ((sizes.cumsum() - sizes)[image] * layers + row) * slots + first
    table[:, 1] = sizes[image]
    table[:, 2] = np.minimum(own.stop - first, block)  # the last block may be smaller
    table[:, 3] = layers * slots
    table[:, 4] = supervision.repeat
    return _Problems(request, table, image, layer, first)


def _pairs_on_gpu(costs: Tensor, problems: Sequence[_Problems]) -> Tensor:
    """Return the pairs of all requests, (4, R) int64: layer, image, slot, target; on the device of the costs."""
    index, slot, target = solve_on_gpu(costs, np.concatenate([own.table for own in problems]), UNMATCHABLE)
    places = torch.from_numpy(np.concatenate([own.places for own in problems], 1))
    layer, image, first = _send(places, costs.device)[:, index]
    return torch.stack([layer, image, slot + first, target])


def _pairs_by_host(costs: Tensor, problems: Sequence[_Problems]) -> Tensor:
    """Return the same by way of the host: one copy there, for which a GPU waits, and one back."""
    on_host = costs.cpu().numpy()
    if not np.isfinite(on_host.sum()):  # by far the cheapest way to ask
        # The step goes on, so that it can name its guilty loss term.
        bad = ~np.isfinite(on_host)
        for own in problems:
            _warn_of(bad, own)
        on_host = np.where(bad, np.float32(UNMATCHABLE), on_host)
    index, slot, target = solve(on_host, np.concatenate([own.table for own in problems]))
    layer, image, first = np.concatenate([own.places for own in problems], 1)[:, index]
    return _send(torch.from_numpy(np.stack([layer, image, slot + first, target])), costs.device)


def _send(numbers: Tensor, device: torch.device) -> Tensor:
    """Return `numbers` of the host on `device`; a copy from pinned memory waits for nothing."""
    return send(numbers.pin_memory() if device.type == "cuda" else numbers, device)


def match(cost: np.ndarray, *, repeat: int = 1, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the slots (ascending) and targets of the cheapest matching of one image and layer, by SciPy.

    The matcher asks `ops.assignment.solve` about all of a step at once; this is what it is tested against.

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


def _assignments(problems: Sequence[_Problems], flat: Tensor) -> list[Assignment]:
    """Return the part of each request of the pairs of all."""
    numbers = [int(number_of_pairs(own.table).sum()) for own in problems]
    assignments = []
    for own, pairs in zip(problems, flat.split(numbers, dim=1)):
        request, supervision = own.request, own.request.supervision
        # Not times the blocks: the losses of blocks add up, each a mean over its targets (H-TransTrack).
        targets = sum(request.targets.sizes) * supervision.repeat
        matched = pairs.shape[1] / max(len(request.rows), 1)
        count = targets if supervision.count == "targets" else matched
        assignments.append(Assignment(*pairs, count=float(count)))
    return assignments


def _warn_of(bad: np.ndarray, problems: _Problems) -> None:
    """Name the problems with costs that are not finite."""
    for index, (offset, targets, slots, stride, _) in enumerate(problems.table.tolist()):
        own = bad[offset + np.arange(targets)[:, None] * stride + np.arange(slots)]
        if own.any():
            warnings.warn(
                f"{own.sum()} of {own.size} matching costs are not finite ({problems.describe(index)}): the "
                "predictions are NaN or infinite",
                stacklevel=2,
            )
