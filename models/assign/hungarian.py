"""Hungarian matching of all sets and layers of a step with one copy to the host (DETR, section 3.1; H-DETR, 3.2)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.assign.costs import class_cost, giou_cost, l1_cost
from util.structures import Assignment, Predictions, Supervision, Target

UNMATCHABLE = 1e6  # stands for a non-finite cost: far above any real one, small enough to keep sums exact


@dataclass
class Request:
    """Predictions of one set that want targets."""

    name: str  # of the set, for messages
    predictions: Predictions
    targets: list[Target]  # labels already 0 where the supervision is class-agnostic
    supervision: Supervision


class HungarianMatcher:
    """Optimal one-to-one matching; with `repeat` k a target may be matched up to k times (one-to-many of H-DETR).

    Args:
        cost_class, cost_bbox, cost_giou: weights of the three terms of the cost.
    """

    def __init__(self, *, cost_class: float = 2.0, cost_bbox: float = 5.0, cost_giou: float = 2.0) -> None:
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("all matching costs are 0: give at least one of class, bbox, giou a weight")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Assignment]:
        """Match every request on all its layers.

        The costs of all sets, layers and images are computed on the device and copied to the host together. Slots are
        ascending within a layer and image; min(N, k M) pairs each, target indices modulo M.
        """
        costs = [[self.cost(r.predictions, t, i) for i, t in enumerate(r.targets)] for r in requests]
        host = _to_host([block for blocks in costs for block in blocks])
        shapes = [[tuple(block.shape) for block in blocks] for blocks in costs]
        solved = [self._solve(r, blocks, host) for r, blocks in zip(requests, shapes)]
        return _to_device(requests, solved)

    def cost(self, predictions: Predictions, target: Target, image: int) -> Tensor:
        """Return the cost block of one image, (L, N, M), float32 on the device of the predictions."""
        logits, boxes = predictions.logits[:, image].float(), predictions.boxes[:, image].float()
        return (
            self.cost_class * class_cost(logits, target.labels)
            + self.cost_bbox * l1_cost(boxes, target.boxes)
            + self.cost_giou * giou_cost(boxes, target.boxes)
        )

    @staticmethod
    def _solve(request: Request, shapes: list[tuple[int, ...]], host: _Reader) -> np.ndarray:
        """Return the pairs of one request, (4, P) int64: layer, image, slot, target."""
        pairs = [np.empty((4, 0), np.int64)]
        for image, (shape, target) in enumerate(zip(shapes, request.targets)):
            for layer, cost in enumerate(host.take(shape)):
                cost = _finite(cost, f"set {request.name}, layer {layer}, image id {target.image_id}")
                slots, columns = linear_sum_assignment(np.tile(cost, request.supervision.repeat))
                found = np.empty((4, len(slots)), np.int64)
                found[0], found[1], found[2] = layer, image, slots
                found[3] = columns % max(cost.shape[1], 1)
                pairs.append(found)
        return np.concatenate(pairs, 1)


class _Reader:
    """Reads blocks one after the other out of a flat array."""

    def __init__(self, flat: np.ndarray) -> None:
        self.flat, self.position = flat, 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        block = self.flat[self.position : self.position + size].reshape(shape)
        self.position += size
        return block


def _to_host(blocks: list[Tensor]) -> _Reader:
    if not blocks:
        return _Reader(np.empty(0, np.float32))
    return _Reader(torch.cat([b.flatten() for b in blocks]).cpu().numpy())


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
        targets = sum(len(t) for t in request.targets) * supervision.repeat
        matched = pairs.shape[1] / max(request.predictions.layers, 1)
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
