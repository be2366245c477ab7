"""Faster R-CNN as an auxiliary head: proposals and their classification (Faster R-CNN; Co-DETR, section 3.2)."""

from __future__ import annotations

from dataclasses import replace

from models.aux_heads.base import AuxHead, AuxOutput, Objects, Pyramid
from models.aux_heads.roi import RoIHead, RoISettings
from models.aux_heads.rpn import RPN, RPNSettings
from util.structures import Detections


class FasterRCNNHead(AuxHead):
    """Region proposal network on all maps, second stage on all but the coarsest.

    Proposals are found with NMS and carry no gradient. NMS is the only thing in a training step that waits for the
    device, once for the whole batch.

    Args:
        num_classes: C, without background.
        width: D, channels of the maps.
        strides: of the pyramid's maps, finest first, at least 2.
        rpn, roi: the published numbers of both stages.
    """

    name = "faster_rcnn"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: tuple[int, ...] = (8, 16, 32, 64, 128),
        rpn: RPNSettings | None = None,
        roi: RoISettings | None = None,
    ) -> None:
        super().__init__()
        if len(strides) < 2:
            raise ValueError(f"strides {strides}: the second stage leaves out the coarsest map, so give at least 2")
        self.rpn = RPN(width=width, strides=strides, settings=rpn or RPNSettings())
        self.roi = RoIHead(num_classes=num_classes, width=width, strides=strides[:-1], settings=roi or RoISettings())

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return the losses of both stages and the sampled regions, positives first.

        `loss_rpn_cls` and `loss_rpn_bbox` are (levels,), `loss_cls` and `loss_bbox` scalars; `acc` is the share of
        regions in their class, percent.
        """
        rpn_losses, proposals = self.rpn(pyramid, objects)
        output = self.roi(pyramid, objects, proposals)
        return replace(output, losses={**rpn_losses, **output.losses})

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Detect with both stages (the published two-stage evaluation); waits for the device in NMS."""
        return self.roi.predict(pyramid, self.rpn.predict(pyramid))
