"""From predictions to detections: the best (query, class) pairs of an image, in pixels of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ops.transfer import send
from util.boxes import cxcywh_to_xyxy, pairwise_iou
from util.structures import Detections, DetectorOutput

NMS_CANDIDATES = 10  # times `topk`: the best pairs that NMS chooses from
SOFT_NMS_LEAST = 1e-3  # lower scores are dropped


class PostProcessor(nn.Module):
    """Deformable-DETR's rule: sigmoid scores of all query-class pairs, the best `topk`, no threshold.

    One query may give several labels.

    Args:
        topk: largest number of detections of an image.
        nms_iou: drop a detection whose IoU with a better one of the same class is above; 0 = no NMS, as published.
        soft_nms_iou: multiply the score of a detection by 1 - IoU for every better one of the same class whose IoU is
            at least this, and drop scores below 0.001 (linear soft-NMS, as in Co-DINO). As many of the best pairs take
            part as there are queries. 0 = no soft-NMS.
        clip: cut boxes at the border of the image, before any NMS (Co-DETR).
        group: name of the set whose predictions count.

    Raises:
        ValueError: both kinds of NMS.
    """

    def __init__(
        self,
        topk: int = 100,
        *,
        nms_iou: float = 0.0,
        soft_nms_iou: float = 0.0,
        clip: bool = False,
        group: str = "one2one",
    ) -> None:
        super().__init__()
        if nms_iou and soft_nms_iou:
            raise ValueError(f"NMS or soft-NMS, not both: got nms_iou={nms_iou} and soft_nms_iou={soft_nms_iou}")
        self.topk = topk
        self.nms_iou = nms_iou
        self.soft_nms_iou = soft_nms_iou
        self.clip = clip
        self.group = group

    def forward(
        self, output: DetectorOutput, orig_sizes: Sequence[tuple[float, float]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Return the detections of each image, best first.

        Args:
            output: of the detector for B images.
            orig_sizes: (h, w) of each image's file, pixels; of a square of `--augment lsj` what it covers in the file.
            image_ids: id of each image.
        """
        if self.group in output.aux_detections:
            return self._of_head(output.aux_detections[self.group], orig_sizes, image_ids)
        found = output.sets[self.group].predictions
        return self.select(found.logits[-1], found.boxes[-1], orig_sizes, image_ids)

    @torch.no_grad()
    def _of_head(
        self, found: list[Detections], orig_sizes: Sequence[tuple[float, float]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Return the detections of an auxiliary head, whose boxes are relative, in pixels of the files."""
        scales = [torch.tensor((w, h, w, h)) for h, w in orig_sizes]
        return [
            replace(
                d,
                scores=d.scores[: self.topk],
                labels=d.labels[: self.topk],
                boxes_px=d.boxes_px[: self.topk] * scale.to(d.boxes_px),
                image_id=int(i),
            )
            for d, scale, i in zip(found, scales, image_ids)
        ]

    @torch.no_grad()
    def select(
        self, logits: Tensor, boxes: Tensor, orig_sizes: Sequence[tuple[float, float]], image_ids: Sequence[int]
    ) -> list[Detections]:
        """Do the same from logits (B, Q, C) and boxes (B, Q, 4) cxcywh in [0, 1]."""
        num_queries, num_classes = logits.shape[1:]
        scores = logits.float().sigmoid().flatten(1)
        wanted = num_queries if self.soft_nms_iou else self.topk * (NMS_CANDIDATES if self.nms_iou else 1)
        scores, index = scores.topk(min(wanted, scores.shape[1]), dim=1)
        query, labels = index // num_classes, index % num_classes
        corners = cxcywh_to_xyxy(boxes.float()).gather(1, query[..., None].expand(-1, -1, 4))
        scale = torch.tensor([(w, h, w, h) for h, w in orig_sizes], dtype=corners.dtype)
        scale = send(scale, corners.device)[:, None]
        corners = corners * scale
        if self.clip:
            corners = torch.minimum(corners.clamp(min=0), scale)
        if self.soft_nms_iou:
            return self._with_softened_doubles(scores, labels, corners, image_ids)
        found = [
            Detections(scores=s, labels=c, boxes_px=b, image_id=int(i))
            for s, c, b, i in zip(scores, labels, corners, image_ids)
        ]
        return [self._without_doubles(f) for f in found] if self.nms_iou else found

    def _without_doubles(self, found: Detections) -> Detections:
        kept = batched_nms(found.boxes_px, found.scores, found.labels, self.nms_iou)[: self.topk]
        return Detections(found.scores[kept], found.labels[kept], found.boxes_px[kept], found.image_id)

    def _with_softened_doubles(
        self, scores: Tensor, labels: Tensor, corners: Tensor, image_ids: Sequence[int]
    ) -> list[Detections]:
        """Return the first `topk` that soft-NMS takes of each image; waits once for the device, for their number."""
        scores, order = soft_nms(scores, labels, corners, self.soft_nms_iou, self.topk)
        labels, corners = labels.gather(1, order), corners.gather(1, order[..., None].expand(-1, -1, 4))
        counts = (scores >= SOFT_NMS_LEAST).sum(1).tolist()
        return [
            Detections(s[:count], c[:count], b[:count], int(i))
            for s, c, b, i, count in zip(scores, labels, corners, image_ids, counts)
        ]


def soft_nms(
    scores: Tensor, labels: Tensor, corners: Tensor, iou_threshold: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Do linear soft-NMS of B images at once (Soft-NMS, arXiv 1704.04503, section 3), each class on its own.

    Each step takes the candidate with the highest score and multiplies the scores of those of its class that overlap it
    by at least `iou_threshold` by 1 - IoU. So scores come out in descending order, and the first steps give the best.

    Args:
        scores, labels: of M candidates, (B, M).
        corners: their boxes, (B, M, 4) xyxy.
        steps: how many to take, at most M are.

    Returns:
        Scores when taken, and which candidate was taken, (B, min(steps, M)) each.
    """
    iou = torch.stack([pairwise_iou(boxes, boxes) for boxes in corners])
    doubles = (labels[:, :, None] == labels[:, None]) & (iou >= iou_threshold)
    factors = torch.where(doubles, 1 - iou, 1.0)
    taken_scores, taken = [], []
    for _ in range(min(steps, scores.shape[1])):
        best, index = scores.max(1, keepdim=True)
        taken_scores.append(best)
        taken.append(index)
        row = factors.gather(1, index[..., None].expand(-1, -1, scores.shape[1]))
        scores = (scores * row[:, 0]).scatter(1, index, -1.0)  # not again
    return torch.cat(taken_scores, 1), torch.cat(taken, 1)
