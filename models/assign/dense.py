"""Targets and slots as padded tensors, and what every pair of them costs: no loop over images, no wait for the device.

Shape letters: `G` = layers times images, the layers one after the other; `M` targets of an image, padded; `N` slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.assign.costs import ALPHA, EPS, GAMMA, class_cost, giou_cost, l1_cost, probability_cost
from models.assign.hungarian import COSTS_AT_ONCE, Request
from ops.transfer import send
from util.boxes import cxcywh_to_xyxy
from util.structures import FlatTargets

ROUND_TO = 8  # M is a multiple of it, so that shapes repeat
DUMMY_BOX = (0.5, 0.5, 0.25, 0.25)  # of positive extent: a masked NaN would still poison gradients


@dataclass
class PaddedTargets:
    """The targets of a batch with M rows for every image; M is known on the host and at least 1."""

    labels: Tensor  # (B, M) int64, 0 at padding
    boxes: Tensor  # (B, M, 4) cxcywh, DUMMY_BOX at padding
    valid: Tensor  # (B, M) bool
    image: Tensor  # (T,) int64, image of each of the T targets
    row: Tensor  # (T,) int64, its index in that image
    sizes: list[int]  # number of targets of each image

    @classmethod
    def of(cls, flat: FlatTargets) -> PaddedTargets:
        """Return `flat` padded, boxes in float32."""
        width = ROUND_TO * -(-max([1, *flat.sizes]) // ROUND_TO)
        shape, device = (len(flat.sizes), width), flat.labels.device
        row = torch.arange(len(flat.labels), device=device) - flat.starts[flat.image]
        where = (flat.image, row)
        boxes = send(torch.tensor(DUMMY_BOX), device).repeat(*shape, 1)
        return cls(
            labels=flat.labels.new_zeros(shape).index_put(where, flat.labels),
            boxes=boxes.index_put(where, flat.boxes.float()),
            valid=torch.zeros(shape, dtype=torch.bool, device=device).index_put(where, torch.ones_like(row).bool()),
            image=flat.image,
            row=row,
            sizes=flat.sizes,
        )

    def of_layers(self, layers: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels (G, M), boxes (G, M, 4) and valid (G, M), the same for every layer."""
        return self.labels.repeat(layers, 1), self.boxes.repeat(layers, 1, 1), self.valid.repeat(layers, 1)


@dataclass
class Slots:
    """The slots that a request means, on all its layers."""

    logits: Tensor  # (G, N, C) float32
    boxes: Tensor  # (G, N, 4) float32
    embeds: Tensor | None  # (G, N, D) float32
    empty: Tensor | None  # (G, N) bool, True = neither positive nor negative
    index: Tensor | None  # (G, N) int64, place in the predictions; None: from `start` on
    start: int
    layers: int

    @classmethod
    def of(cls, request: Request, *, best: int | None = None, embeds: bool = True) -> Slots:
        """Return the slots of `request`; only the `best` ones by their first logit, if that is given."""
        found, rows, part = request.predictions.select_layers(request.rows), request.rows, request.slots
        features = None
        if embeds and found.embeds is not None:
            features = torch.stack([x[:, part].float() for x in found.embeds]).flatten(0, 1)
        padding = None if found.padding is None else found.padding[:, part].repeat(len(rows), 1)
        logits, boxes = (x[:, :, part].flatten(0, 1).float() for x in (found.logits, found.boxes))
        slots = cls(logits, boxes, features, padding, None, part.start, len(rows))
        return slots if best is None or best >= logits.shape[1] else slots.best(best)

    def best(self, count: int) -> Slots:
        """Return the `count` slots of each image and layer with the highest first logit."""
        index = self.logits[..., 0].detach().topk(count, dim=1).indices

        def pick(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            where = index if values.ndim == 2 else index[..., None].expand(-1, -1, values.shape[2])
            return values.gather(1, where)

        return Slots(
            *(pick(x) for x in (self.logits, self.boxes, self.embeds, self.empty)),
            index + self.start,
            self.start,
            self.layers,
        )

    def detached(self) -> Slots:
        """Return the slots with predictions that get no gradient."""
        return replace(self, logits=self.logits.detach(), boxes=self.boxes.detach())

    def place(self, group: Tensor, slot: Tensor) -> Tensor:
        """Return where the slots `slot` of the rows `group` of G are in the predictions."""
        return slot + self.start if self.index is None else self.index[group, slot]


@dataclass
class DenseCosts:
    """What it costs to give a target to a slot, (G, M, N) each."""

    total: Tensor
    geometry: Tensor  # the part of the boxes: weighted L1 and 1 - GIoU


@dataclass(frozen=True)
class PairCosts:
    """Weights of the terms, and whether the class term is that of all classes of the slot.

    The latter also counts what the slot says of other classes: it prefers quiet slots.
    """

    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    all_classes: bool = False
    giou_eps: float = 0.0  # added to the denominators of the GIoU

    def __call__(self, slots: Slots, labels: Tensor, boxes: Tensor) -> DenseCosts:
        """Return the costs of all pairs of `slots` with `labels` (G, M) and `boxes` (G, M, 4), in chunks of targets."""
        entries = slots.logits.shape[0] * slots.logits.shape[1]
        step = max(COSTS_AT_ONCE // max(entries, 1), 1)
        # The coordinate comes first in memory: whole planes are faster than every fourth number.
        planes = torch.cat([slots.boxes, cxcywh_to_xyxy(slots.boxes)], -1).permute(2, 0, 1).contiguous()
        quiet = _silence(slots.logits.sigmoid()).sum(-1) if self.all_classes else None
        parts = [
            self._chunk(slots.logits, planes, quiet, labels[:, i : i + step], boxes[:, i : i + step])
            for i in range(0, labels.shape[1], step)
        ]
        totals, geometries = zip(*parts)
        return DenseCosts(torch.cat(totals, 1), torch.cat(geometries, 1))

    def _chunk(
        self, logits: Tensor, planes: Tensor, quiet: Tensor | None, labels: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        own, corners = planes[:, :, None].movedim(0, -1).split(4, dim=-1)  # (G, 1, N, 4)
        boxes = boxes[:, :, None]
        distance = sum((a - b).abs() for a, b in zip(own.unbind(-1), boxes.unbind(-1)))
        overlap = 1 + giou_cost(corners, cxcywh_to_xyxy(boxes), self.giou_eps)
        geometry = self.cost_bbox * distance + self.cost_giou * overlap
        index = labels[..., None].expand(-1, -1, logits.shape[1])
        classes = class_cost(logits.mT.gather(1, index))
        if quiet is not None:
            classes = classes + quiet[:, None]
        return self.cost_class * classes + geometry, geometry

    def of_mean(self, c: Tensor, slots: Slots, labels: Tensor, boxes: Tensor) -> Tensor:
        """Return the cost (G, M) of the mean prediction that each target gets, in place of a mean of costs.

        Classes are averaged as probabilities: linear in `c`, and a mean of logits would be ruled by the many slots that
        are sure of saying nothing.

        Args:
            c: (G, M, N), rows of sum 1.
            slots: what is averaged; boxes as cxcywh.
            labels, boxes: (G, M) and (G, M, 4) of the targets.
        """
        classes, found = c @ slots.logits.sigmoid(), c @ slots.boxes
        cost = probability_cost(classes.gather(2, labels[..., None])[..., 0])
        if self.all_classes:
            cost = cost + _silence(classes).sum(-1)
        overlap = 1 + giou_cost(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
        return self.cost_class * cost + self.cost_bbox * l1_cost(found, boxes) + self.cost_giou * overlap


def _silence(p: Tensor) -> Tensor:
    """Return the focal cost of saying nothing where probabilities are `p`, same shape."""
    return (1 - ALPHA) * p**GAMMA * -(1 - p + EPS).log()
