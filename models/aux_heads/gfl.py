"""GFL as an auxiliary head: joint scores of class and quality, sides as distributions (Li et al. 2020).

Positives are those of ATSS. Co-DETR compares it in its ablation of heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aux_heads.anchors import AnchorGrid, giou_loss, paired_iou
from models.aux_heads.atss import assign_atss
from models.aux_heads.base import AuxOutput, Objects, Pyramid, Samples, average_over_processes
from models.aux_heads.dense import (
    DenseHead,
    Scale,
    box_around,
    detect,
    distances,
    flatten,
    objects_of,
    one_hot,
    predictor,
    strides_of,
    sum_by_level,
)
from util.structures import Detections


class Integral(nn.Module):
    """The mean of a distribution over 0, 1, .., `largest`; the values are a buffer, as in published checkpoints."""

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.register_buffer("project", torch.linspace(0, largest, largest + 1))

    def forward(self, logits: Tensor) -> Tensor:
        """Return (...) from logits (..., largest + 1)."""
        return (logits.softmax(-1) * self.project).sum(-1)


class GFLHead(DenseHead):
    """One square anchor of 8 strides per cell; the distance to each side is the mean of a distribution, in strides.

    Args:
        num_classes: C.
        width: channels of pyramid and towers, a multiple of 32.
        strides: of the levels.
        stacked_convs: convolutions of each tower.
        topk: candidates of an object in each level.
        largest: distance that the distributions end at, in strides.
        class_weight, box_weight, distribution_weight: of the three losses.
    """

    name = "gfl"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        stacked_convs: int = 1,
        topk: int = 9,
        largest: int = 16,
        class_weight: float = 1.0,
        box_weight: float = 2.0,
        distribution_weight: float = 0.25,
    ) -> None:
        grid = AnchorGrid(strides, scales=(8,), ratios=(1.0,))
        super().__init__(num_classes=num_classes, width=width, grid=grid, stacked_convs=stacked_convs, norm=True)
        self.topk, self.largest = topk, largest
        self.class_weight, self.box_weight, self.distribution_weight = class_weight, box_weight, distribution_weight
        self.gfl_cls = predictor(width, num_classes)
        self.gfl_reg = predictor(width, 4 * (largest + 1))
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.integral = Integral(largest)
        self.initialise(self.gfl_cls)

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return `loss_cls`, `loss_bbox` and `loss_dfl`, (levels,) each, and the anchors as samples.

        The class loss is divided by the number of positives, where every image counts at least one; the other two are
        weighted by the best class score of each positive and divided by the sum of these.
        """
        logits, sides = self._outputs(pyramid)
        anchors, usable, counts = self.place(pyramid)
        points, strides = anchors.view(-1, 2, 2).mean(1), strides_of(self.grid.strides, counts, anchors.device)[:, None]
        target, positive = assign_atss(anchors, counts, objects, usable, topk=self.topk)
        labels, boxes = objects_of(target, objects)
        decoded = box_around(points, self.integral(sides) * strides)

        count = average_over_processes(positive.sum(1).clamp(min=1).sum().float())
        iou = paired_iou(decoded.detach(), boxes) * positive
        wanted = one_hot(labels, positive, self.num_classes) * iou[..., None]
        quality = quality_focal_loss(logits, wanted).sum(-1) * usable
        weight = logits.detach().amax(-1).sigmoid() * positive
        total = average_over_processes(weight.sum()).clamp(min=1)
        giou = giou_loss(decoded, boxes) * weight
        distribution = distribution_focal_loss(sides, distances(points, boxes) / strides).mean(-1) * weight
        losses = {
            "loss_cls": self.class_weight * sum_by_level(quality, counts) / count,
            "loss_bbox": self.box_weight * sum_by_level(giou, counts) / total,
            "loss_dfl": self.distribution_weight * sum_by_level(distribution, counts) / total,
        }
        samples = Samples(anchors * usable[..., None], positive, ~positive, target, pyramid.tokens())
        return AuxOutput(losses, samples, logits)

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Return the detections of each image, best first, at most 100. NMS waits for the device."""
        logits, sides = self._outputs(pyramid)
        anchors, _, counts = self.place(pyramid)
        strides = strides_of(self.grid.strides, counts, anchors.device)[:, None]
        boxes = box_around(anchors.view(-1, 2, 2).mean(1), self.integral(sides) * strides)
        return detect(logits.sigmoid(), boxes, counts, pyramid, nms_iou=0.6)

    def _outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Return class logits (B, R, C) and the logits of the four distances (B, R, 4, largest + 1)."""
        classes, boxes = self.towers(pyramid)
        logits = flatten([self.gfl_cls(x) for x in classes], self.num_classes)
        sides = [scale(self.gfl_reg(x)) for scale, x in zip(self.scales, boxes)]
        return logits, flatten(sides, 4 * (self.largest + 1)).unflatten(-1, (4, -1))


def quality_focal_loss(logits: Tensor, wanted: Tensor, *, beta: float = 2.0) -> Tensor:
    """Return the cross entropy with soft targets times |target - probability|^beta (GFL, equation 5).

    Args:
        logits: (...).
        wanted: (...) in [0, 1]: the IoU at the class of a positive, 0 elsewhere.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return entropy * (wanted - logits.sigmoid()).abs().pow(beta)


def distribution_focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross entropy (...) with the two integers next to a number, by nearness (GFL, equation 6).

    Args:
        logits: (..., n + 1), of the integers 0 .. n.
        wanted: (...), cut to [0, n - 0.1].
    """
    wanted = wanted.clamp(0, logits.shape[-1] - 1 - 0.1)
    below = wanted.floor()
    above_share = (wanted - below)[..., None]
    index = below.long()[..., None]
    log_share = logits.log_softmax(-1)
    entropy = (1 - above_share) * log_share.gather(-1, index) + above_share * log_share.gather(-1, index + 1)
    return -entropy.squeeze(-1)
