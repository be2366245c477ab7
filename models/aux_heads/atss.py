"""ATSS as an auxiliary head: the positives of an object are chosen by its own IoU statistics (Zhang et al. 2020).

The head Co-DETR uses most (table 4). Its anchors are centred on the corners of the cells, one square of side 8 strides
for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss

from models.aux_heads.anchors import AnchorGrid, DeltaCoder, giou_loss, paired_iou
from models.aux_heads.base import AuxOutput, Objects, Pyramid, Samples, average_over_processes
from models.aux_heads.dense import (
    DenseHead,
    Scale,
    detect,
    distances,
    flatten,
    objects_of,
    one_hot,
    predictor,
    sum_by_level,
)
from models.aux_heads.fcos import centerness_of
from util.structures import Detections

ANCHOR_SCALE = 8  # side of the anchor in strides (ATSS, section 4.1)
INSIDE = 0.01  # pixels by which the centre of a positive is inside its object
NMS_IOU = 0.6  # of two detections of a class (ATSS, section 4.1)


class ATSSHead(DenseHead):
    """One anchor per cell; classes, boxes and centreness. Training never waits for the device.

    Args:
        num_classes: C.
        width: D, channels of pyramid and towers, a multiple of 32.
        strides: of the pyramid's maps, finest first.
        stacked_convs: convolutions of each tower (1 in Co-DETR, 4 in ATSS).
        topk: candidates of an object on each level.
        class_weight, box_weight, centerness_weight: of the three losses.
    """

    name = "atss"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        stacked_convs: int = 1,
        topk: int = 9,
        class_weight: float = 1.0,
        box_weight: float = 2.0,
        centerness_weight: float = 1.0,
    ) -> None:
        grid = AnchorGrid(strides, scales=(ANCHOR_SCALE,), ratios=(1.0,))
        super().__init__(num_classes=num_classes, width=width, grid=grid, stacked_convs=stacked_convs, norm=True)
        self.topk, self.coder = topk, DeltaCoder((0.1, 0.1, 0.2, 0.2))
        self.class_weight, self.box_weight, self.centerness_weight = class_weight, box_weight, centerness_weight
        self.atss_cls = predictor(width, num_classes)
        self.atss_reg = predictor(width, 4)
        self.atss_centerness = predictor(width, 1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.initialise(self.atss_cls)

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return the losses `loss_cls`, `loss_bbox`, `loss_centerness`, (levels,) each, and all anchors as samples.

        Anchors of cells outside an image count in no loss. Among the samples they are negatives with the box 0, which
        may become decoder queries where an image has few positives (published, and so part of the numbers).
        """
        logits, deltas, centerness = self.outputs(pyramid)
        anchors, usable, counts = self.place(pyramid)
        target, positive = assign_atss(anchors, counts, objects, usable, topk=self.topk)
        labels, boxes = objects_of(target, objects)
        count = average_over_processes(positive.sum(1).clamp(min=1).sum().float())
        wanted = centerness_targets(anchors, boxes, positive)
        total = average_over_processes(wanted.sum()).clamp(min=1)

        focal = sigmoid_focal_loss(logits, one_hot(labels, positive, self.num_classes)).sum(-1) * usable
        # A box that is not positive is compared with its own anchor: no number is odd enough to survive a weight of 0.
        goal = torch.where(positive[..., None], boxes, anchors)
        giou = giou_loss(self.coder.decode(anchors, deltas), goal) * wanted
        entropy = binary_cross_entropy_with_logits(centerness, wanted, reduction="none") * positive
        losses = {
            "loss_cls": self.class_weight * sum_by_level(focal, counts) / count,
            "loss_bbox": self.box_weight * sum_by_level(giou, counts) / total,
            "loss_centerness": self.centerness_weight * sum_by_level(entropy, counts) / count,
        }
        samples = Samples(anchors * usable[..., None], positive, ~positive, target, pyramid.tokens())
        return AuxOutput(losses, samples, logits)

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Return the detections of each image, best first, at most 100. NMS waits for the device."""
        logits, deltas, centerness = self.outputs(pyramid)
        anchors, _, counts = self.place(pyramid)
        boxes = self.coder.decode(anchors, deltas)
        return detect(logits.sigmoid(), boxes, counts, pyramid, quality=centerness.sigmoid(), nms_iou=NMS_IOU)

    def outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits (B, A, C), box deltas (B, A, 4) and centreness logits (B, A), at least float32.

        Raises:
            ValueError: if the pyramid has other strides than the head.
        """
        classes, boxes = self.towers(pyramid)
        logits = flatten([self.atss_cls(x) for x in classes], self.num_classes)
        deltas = flatten([scale(self.atss_reg(x)) for scale, x in zip(self.scales, boxes)], 4)
        return logits, deltas, flatten([self.atss_centerness(x) for x in boxes], 1).squeeze(-1)


def centerness_targets(anchors: Tensor, boxes: Tensor, positive: Tensor) -> Tensor:
    """Return (B, A): how central the anchor of a positive is in its object (FCOS, equation 3), 0 for other anchors.

    Args:
        anchors: (A, 4).
        boxes: (B, A, 4), the object of each positive.
        positive: (B, A) bool.
    """
    centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    return torch.where(positive, centerness_of(distances(centres, boxes)), 0.0)


@torch.no_grad()
def assign_atss(
    anchors: Tensor, counts: Sequence[int], objects: Objects, usable: Tensor, *, topk: int = 9
) -> tuple[Tensor, Tensor]:
    """Choose the positive anchors of each object by the statistics of its nearest ones (ATSS, algorithm 1).

    The candidates of an object are the `topk` anchors of each level whose centres are nearest to its centre. Those are
    positive whose IoU reaches the mean plus the (unbiased) standard deviation of all candidates, and whose centre is
    inside the object. An anchor that several objects want goes to the one with the highest IoU, the first of equals.

    Args:
        anchors: (A, 4).
        counts: number of anchors of each level, A in all.
        objects: M of each image.
        usable: (B, A) bool; other anchors are no candidates.
        topk: candidates per level; all anchors of a level with fewer.

    Returns:
        Index of the object (B, A) int64, 0 where there is none, and which anchors are positive (B, A) bool.
    """
    candidate = _nearest(anchors, counts, objects.boxes, usable, topk)  # (B, K, M)
    batch, _, most = candidate.shape
    index = candidate.flatten(1)
    eligible = usable.gather(1, index).view_as(candidate) & objects.valid[:, None]  # levels may run out of usable ones
    boxes = objects.boxes[:, None]  # (B, 1, M, 4)
    chosen = anchors[candidate]  # (B, K, M, 4)
    iou = paired_iou(chosen, boxes)
    reached = iou >= _mean_plus_std(iou, eligible)
    centres = 0.5 * (chosen[..., :2] + chosen[..., 2:])
    wants = eligible & reached & (distances(centres, boxes).amin(-1) > INSIDE)

    # Conflicts are solved among the candidates: a table of all anchors and objects would be a thousand times larger.
    bid = iou.masked_fill(~wants, -1.0).flatten(1)
    best = bid.new_full((batch, len(anchors)), -1.0).scatter_reduce(1, index, bid, "amax")
    wins = wants.flatten(1) & (bid == best.gather(1, index))
    number = torch.arange(most, device=anchors.device).expand_as(candidate).flatten(1)
    target = torch.full_like(best, most, dtype=torch.int64)
    target = target.scatter_reduce(1, index, torch.where(wins, number, most), "amin")
    positive = target < most
    return torch.where(positive, target, 0), positive


def _nearest(anchors: Tensor, counts: Sequence[int], boxes: Tensor, usable: Tensor, topk: int) -> Tensor:
    """Return (B, K, M) int64: of each level the `topk` usable anchors whose centres are nearest to those of `boxes`.

    Levels with fewer usable anchors are filled up with others.
    """
    centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    goals = 0.5 * (boxes[..., :2] + boxes[..., 2:])
    nearest, first = [], 0
    for points, inside in zip(centres.split(list(counts)), usable.split(list(counts), dim=1)):
        x = points[:, None, 0] - goals[:, None, :, 0]  # (B, level, M)
        y = points[:, None, 1] - goals[:, None, :, 1]
        away = (x.square() + y.square()).sqrt().masked_fill(~inside[..., None], torch.inf)
        nearest.append(away.topk(min(topk, len(points)), dim=1, largest=False)[1] + first)
        first += len(points)
    return torch.cat(nearest, 1)


def _mean_plus_std(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean plus the unbiased standard deviation of `values` (B, K, M) over K where `mask`: (B, 1, M)."""
    number = mask.sum(1, keepdim=True)
    mean = (values * mask).sum(1, keepdim=True) / number.clamp(min=1)
    square = ((values - mean).square() * mask).sum(1, keepdim=True)
    return mean + (square / (number - 1).clamp(min=1)).sqrt()
