"""RetinaNet as an auxiliary head: nine anchors per cell, assigned by IoU (Lin et al. 2017; Co-DETR, table 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from models.aux_heads.anchors import AnchorGrid, DeltaCoder, assign_max_iou, giou_loss, pairwise_iou
from models.aux_heads.base import AuxOutput, Objects, Pyramid, Samples, average_over_processes
from models.aux_heads.dense import (
    LEAST_IOU,
    DenseHead,
    detect,
    flatten,
    objects_of,
    one_hot,
    predictor,
    sum_by_level,
)
from util.structures import Detections


class RetinaNetHead(DenseHead):
    """Towers without norm; focal loss and GIoU of the decoded boxes.

    Args:
        num_classes: C.
        width: channels of pyramid and towers.
        strides: of the levels.
        stacked_convs: convolutions of each tower.
        scales, ratios: of the anchors of a cell, in strides.
        class_weight, box_weight: of the two losses.
    """

    name = "retinanet"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        stacked_convs: int = 1,
        scales: Sequence[float] = (4.0, 4.0 * 2 ** (1 / 3), 4.0 * 2 ** (2 / 3)),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        class_weight: float = 1.0,
        box_weight: float = 2.0,
    ) -> None:
        grid = AnchorGrid(strides, scales=scales, ratios=ratios)
        super().__init__(num_classes=num_classes, width=width, grid=grid, stacked_convs=stacked_convs, norm=False)
        self.coder = DeltaCoder()
        self.class_weight, self.box_weight = class_weight, box_weight
        self.retina_cls = predictor(width, self.grid.per_cell * num_classes)
        self.retina_reg = predictor(width, self.grid.per_cell * 4)
        self.initialise(self.retina_cls)

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return `loss_cls` and `loss_bbox`, (levels,) each, and the anchors as samples.

        Both are divided by the number of positives, where every image counts at least one.
        """
        logits, deltas = self._outputs(pyramid)
        anchors, usable, counts = self.place(pyramid)
        target, positive, negative = self._assign(anchors, usable, objects)
        labels, boxes = objects_of(target, objects)
        count = average_over_processes(positive.sum(1).clamp(min=1).sum().float())
        focal = sigmoid_focal_loss(logits, one_hot(labels, positive, self.num_classes)).sum(-1)
        focal = torch.where(positive | negative, focal, 0.0)
        giou = giou_loss(self.coder.decode(anchors, deltas), boxes) * positive
        losses = {
            "loss_cls": self.class_weight * sum_by_level(focal, counts) / count,
            "loss_bbox": self.box_weight * sum_by_level(giou, counts) / count,
        }
        cells = self.grid.cell_of(pyramid.shapes, logits.device)
        background = negative | ~usable  # as in ATSS
        samples = Samples(anchors * usable[..., None], positive, background, target, pyramid.tokens(), cells)
        return AuxOutput(losses, samples, logits)

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Return the detections of each image, best first, at most 100. NMS waits for the device."""
        logits, deltas = self._outputs(pyramid)
        anchors, _, counts = self.place(pyramid)
        return detect(logits.sigmoid(), self.coder.decode(anchors, deltas), counts, pyramid, nms_iou=0.5)

    def _assign(self, anchors: Tensor, usable: Tensor, objects: Objects) -> tuple[Tensor, Tensor, Tensor]:
        """Return target, positive and negative, (B, R) each.

        Image by image: nine anchors per cell and hundreds of objects make a large table.
        """
        found = [
            assign_max_iou(
                pairwise_iou(anchors[None], objects.boxes[i : i + 1]),
                objects.valid[i : i + 1],
                usable[i : i + 1],
                positive=0.5,
                negative=0.4,
                min_positive=LEAST_IOU,
                low_quality=True,
            )
            for i in range(len(usable))
        ]
        target, positive, negative = (torch.cat(parts) for parts in zip(*found))
        return target, positive, negative

    def _outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Return class logits (B, R, C) and deltas (B, R, 4)."""
        classes, boxes = self.towers(pyramid)
        logits = flatten([self.retina_cls(x) for x in classes], self.num_classes)
        return logits, flatten([self.retina_reg(x) for x in boxes], 4)
