"""From predictions to detections: the best (query, class) pairs of an image, in pixels of its file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from util.boxes import cxcywh_to_xyxy
from util.structures import Detections, DetectorOutput


class PostProcessor(nn.Module):
    """Deformable-DETR's rule: sigmoid scores of all query-class pairs, the best `topk`, no NMS, no threshold.

    One query may give several labels; boxes are not clipped.
    """

    def __init__(self, topk: int = 100) -> None:
        super().__init__()
        self.topk = topk

    def forward(
        self, output: DetectorOutput, orig_sizes: Sequence[tuple[int, int]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Return the detections of each image, best first.

        Args:
            output: of the detector for B images.
            orig_sizes: (h, w) of each image's file, pixels.
            image_ids: id of each image.
        """
        return self.select(output.pred_logits, output.pred_boxes, orig_sizes, image_ids)

    @torch.no_grad()
    def select(
        self, logits: Tensor, boxes: Tensor, orig_sizes: Sequence[tuple[int, int]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Do the same from logits (B, Q, C) and boxes (B, Q, 4) cxcywh in [0, 1]."""
        num_classes = logits.shape[-1]
        scores = logits.float().sigmoid().flatten(1)
        scores, index = scores.topk(min(self.topk, scores.shape[1]), dim=1)
        query, labels = index // num_classes, index % num_classes
        corners = cxcywh_to_xyxy(boxes.float()).gather(1, query[..., None].expand(-1, -1, 4))
        scale = torch.tensor([(w, h, w, h) for h, w in orig_sizes], dtype=corners.dtype)
        corners = corners * scale.to(corners.device, non_blocking=True)[:, None]
        return [
            Detections(scores=s, labels=c, boxes_px=b, image_id=int(i))
            for s, c, b, i in zip(scores, labels, corners, image_ids)
        ]
