"""From predictions to detections: the best (query, class) pairs of an image, in pixels of its file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from util.boxes import cxcywh_to_xyxy
from util.structures import Detections, DetectorOutput

NMS_CANDIDATES = 10  # times `topk`: the best pairs that NMS chooses from


class PostProcessor(nn.Module):
    """Deformable-DETR's rule: sigmoid scores of all query-class pairs, the best `topk`, no threshold.

    One query may give several labels; boxes are not clipped.

    Args:
        topk: largest number of detections of an image.
        nms_iou: drop a detection whose IoU with a better one of the same class is above; 0 = no NMS, as published.
        group: name of the set whose predictions count.
    """

    def __init__(self, topk: int = 100, *, nms_iou: float = 0.0, group: str = "one2one") -> None:
        super().__init__()
        self.topk = topk
        self.nms_iou = nms_iou
        self.group = group

    def forward(
        self, output: DetectorOutput, orig_sizes: Sequence[tuple[int, int]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Return the detections of each image, best first.

        Args:
            output: of the detector for B images.
            orig_sizes: (h, w) of each image's file, pixels.
            image_ids: id of each image.
        """
        found = output.sets[self.group].predictions
        return self.select(found.logits[-1], found.boxes[-1], orig_sizes, image_ids)

    @torch.no_grad()
    def select(
        self, logits: Tensor, boxes: Tensor, orig_sizes: Sequence[tuple[int, int]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Do the same from logits (B, Q, C) and boxes (B, Q, 4) cxcywh in [0, 1]."""
        num_classes = logits.shape[-1]
        scores = logits.float().sigmoid().flatten(1)
        wanted = self.topk * (NMS_CANDIDATES if self.nms_iou else 1)
        scores, index = scores.topk(min(wanted, scores.shape[1]), dim=1)
        query, labels = index // num_classes, index % num_classes
        corners = cxcywh_to_xyxy(boxes.float()).gather(1, query[..., None].expand(-1, -1, 4))
        scale = torch.tensor([(w, h, w, h) for h, w in orig_sizes], dtype=corners.dtype)
        corners = corners * scale.to(corners.device, non_blocking=True)[:, None]
        found = [
            Detections(scores=s, labels=c, boxes_px=b, image_id=int(i))
            for s, c, b, i in zip(scores, labels, corners, image_ids)
        ]
        return [self._without_doubles(f) for f in found] if self.nms_iou else found

    def _without_doubles(self, found: Detections) -> Detections:
        kept = batched_nms(found.boxes_px, found.scores, found.labels, self.nms_iou)[: self.topk]
        return Detections(found.scores[kept], found.labels[kept], found.boxes_px[kept], found.image_id)
