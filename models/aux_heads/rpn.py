"""Region proposal network: where there may be an object of any class (Faster R-CNN, section 3.1; Co-DETR, appendix)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from models.aux_heads.anchors import AnchorGrid, DeltaCoder, assign_max_iou, pairwise_iou
from models.aux_heads.base import Objects, Pyramid
from models.aux_heads.sampling import Sampled, sample
from ops.module import at_least_float32
from ops.transfer import send

BOXES_PER_NMS = 2**16  # NMS compares all boxes of a call: its memory grows with their square, here to 512 MiB


@dataclass
class Proposals:
    """Boxes that may hold an object, best first; R is the same for every image. Without gradient."""

    boxes: Tensor  # (B, R, 4) xyxy in pixels, inside the image; 0 where there is no proposal
    valid: Tensor  # (B, R) bool


@dataclass(frozen=True)
class ProposalRule:
    """How many proposals are made."""

    candidates: int  # of a level, that enter NMS
    keep: int = 1000  # of an image, after NMS
    nms_iou: float = 0.7


@dataclass(frozen=True)
class RPNSettings:
    """Published numbers of the first stage (Co-Deformable-DETR and Co-DINO with ResNet or Swin)."""

    scales: tuple[float, ...] = tuple(4 * 2 ** (i / 3) for i in range(3))  # anchor sides in strides
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    samples: int = 256  # of an image
    fraction: float = 0.5  # largest share of positives
    positive_iou: float = 0.7
    negative_iou: float = 0.3  # also the least IoU with which an object takes its best anchors
    class_weight: float = 1.0
    box_weight: float = 1.0
    training: ProposalRule = ProposalRule(4000)
    testing: ProposalRule = ProposalRule(1000)


class RPN(nn.Module):
    """One convolution shared by all levels, then objectness and box of every anchor.

    Args:
        width: D, channels of the maps.
        strides: of the maps, finest first.
        settings: see there.
    """

    def __init__(self, *, width: int, strides: tuple[int, ...], settings: RPNSettings) -> None:
        super().__init__()
        self.settings = settings
        self.grid = AnchorGrid(strides, scales=settings.scales, ratios=settings.ratios)
        self.coder = DeltaCoder()
        self.rpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.rpn_cls = nn.Conv2d(width, self.grid.per_cell, 1)
        self.rpn_reg = nn.Conv2d(width, self.grid.per_cell * 4, 1)
        for layer in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, pyramid: Pyramid, objects: Objects) -> tuple[dict[str, Tensor], Proposals]:
        """Return `loss_rpn_cls` and `loss_rpn_bbox`, (levels,) each, and the proposals of a training step."""
        logits, deltas = self.score(pyramid)
        picked, target = self.choose(pyramid, objects)
        losses = self.losses(pyramid, objects, logits, deltas, picked, target)
        return losses, self.propose(pyramid, logits, deltas, self.settings.training)

    def predict(self, pyramid: Pyramid) -> Proposals:
        """Return the proposals of an evaluation."""
        return self.propose(pyramid, *self.score(pyramid), self.settings.testing)

    def score(self, pyramid: Pyramid) -> tuple[Tensor, Tensor]:
        """Return objectness logits (B, A) and deltas (B, A, 4) of all anchors, at least float32."""
        logits, deltas = [], []
        for features in pyramid.maps:
            features = self.rpn_conv(features).relu()
            # Channels go last before flattening, so that the anchors of a cell follow each other.
            logits.append(self.rpn_cls(features).movedim(1, -1).flatten(1))
            deltas.append(self.rpn_reg(features).movedim(1, -1).flatten(1).unflatten(1, (-1, 4)))
        return at_least_float32(torch.cat(logits, 1)), at_least_float32(torch.cat(deltas, 1))

    @torch.no_grad()
    def choose(self, pyramid: Pyramid, objects: Objects) -> tuple[Sampled, Tensor]:
        """Return the sampled anchors and their objects, (B, S) int64.

        Image by image and with its own objects only: the table of IoUs is the largest tensor of the step (0.8 million
        anchors in Co-DINO), and a crowded image shall not multiply it by the size of the batch.
        """
        device = objects.boxes.device
        anchors = self.grid.anchors(pyramid.shapes, device)[None]
        usable = self.grid.usable(pyramid.shapes, pyramid.usable, device)
        assigned = []
        for i, count in enumerate(objects.counts):
            own = slice(0, max(count, 1))
            iou = pairwise_iou(anchors, objects.boxes[i : i + 1, own])
            assigned.append(
                assign_max_iou(
                    iou,
                    objects.valid[i : i + 1, own],
                    usable[i : i + 1],
                    positive=self.settings.positive_iou,
                    negative=self.settings.negative_iou,
                    min_positive=self.settings.negative_iou,
                    low_quality=True,
                )
            )
        target, positive, negative = (torch.cat(parts) for parts in zip(*assigned))
        picked = sample(positive, negative, total=self.settings.samples, fraction=self.settings.fraction)
        return picked, picked.of(target) * picked.positive

    def losses(
        self, pyramid: Pyramid, objects: Objects, logits: Tensor, deltas: Tensor, picked: Sampled, target: Tensor
    ) -> dict[str, Tensor]:
        """Return binary cross-entropy and L1 of the deltas, (levels,) each, over the sampled anchors.

        Both are divided by the number of anchors sampled in the batch, in which an image without positives or without
        negatives counts one of them all the same (published).
        """
        anchors = self.grid.anchors(pyramid.shapes, logits.device)[picked.index]
        boxes = objects.boxes.gather(1, target[..., None].expand(-1, -1, 4))
        # Negatives get their own anchor as target: finite, and then left out.
        wanted = self.coder.encode(anchors, torch.where(picked.positive[..., None], boxes, anchors))
        off = (picked.of(deltas) - wanted).abs().sum(-1) * picked.positive
        found = picked.of(logits)
        entropy = F.binary_cross_entropy_with_logits(found, picked.positive.to(found.dtype), reduction="none")
        count = picked.positive.sum(1).clamp(min=1).sum() + picked.negative.sum(1).clamp(min=1).sum()
        return {
            "loss_rpn_cls": self.settings.class_weight
            * self._by_level(entropy * picked.taken, picked, pyramid)
            / count,
            "loss_rpn_bbox": self.settings.box_weight * self._by_level(off, picked, pyramid) / count,
        }

    def _by_level(self, values: Tensor, picked: Sampled, pyramid: Pyramid) -> Tensor:
        """Sum `values` (B, S) of sampled anchors by their level, (levels,)."""
        stops = torch.tensor(self.grid.level_counts(pyramid.shapes)).cumsum(0)
        level = torch.bucketize(picked.index, send(stops, values.device), right=True)
        levels = torch.arange(len(stops), device=values.device)
        return (values[..., None] * (level[..., None] == levels)).sum((0, 1))

    @torch.no_grad()
    def propose(self, pyramid: Pyramid, logits: Tensor, deltas: Tensor, rule: ProposalRule) -> Proposals:
        """Return the best boxes of all cells, in the padding too, after NMS within each level.

        Candidates are ranked by level, so that fine levels do not crowd out coarse ones, and the result over all
        levels. Boxes are cut to their image; empty ones are dropped. Waits for the device once (see `_survivors`).
        """
        counts = self.grid.level_counts(pyramid.shapes)
        anchors = self.grid.anchors(pyramid.shapes, logits.device)
        sizes = send(torch.tensor(pyramid.sizes), logits.device)
        boxes, scores, levels = [], [], []
        for own, own_logits, own_deltas in zip(anchors.split(counts), logits.split(counts, 1), deltas.split(counts, 1)):
            best, index = own_logits.sigmoid().topk(min(rule.candidates, own_logits.shape[1]), dim=1)
            own_deltas = own_deltas.gather(1, index[..., None].expand(-1, -1, 4))
            boxes.append(self.coder.decode(own[index], own_deltas, clip=sizes))
            scores.append(best)
            levels.append(torch.full_like(index[0], len(levels)))
        boxes, scores, level = torch.cat(boxes, 1), torch.cat(scores, 1), torch.cat(levels)
        scores = scores.masked_fill(~(boxes[..., 2:] > boxes[..., :2]).all(-1), -1.0)
        survive = _survivors(boxes, scores, level, canvas=pyramid.canvas, nms_iou=rule.nms_iou) & (scores >= 0)
        # Stable: saturated scores keep their order.
        best, index = scores.masked_fill(~survive, -1.0).sort(dim=1, descending=True, stable=True)
        best, index = best[:, : rule.keep], index[:, : rule.keep]
        valid = best >= 0
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        return Proposals(boxes, valid)


def _survivors(boxes: Tensor, scores: Tensor, level: Tensor, *, canvas: tuple[int, int], nms_iou: float) -> Tensor:
    """Return which boxes (B, N, 4) inside the canvas survive NMS among those of their image and level, (B, N) bool.

    Args:
        scores: (B, N).
        level: (N,) int64, ascending.
        canvas: (H, W) in pixels.
    """
    if boxes.is_cuda:
        return _survivors_at_once(boxes, scores, level, canvas=canvas, nms_iou=nms_iou)
    # A processor waits for nothing, and its time grows with the square of the boxes in a call.
    survive = torch.zeros_like(scores, dtype=torch.bool)
    sizes = level.bincount().tolist()
    for image, *parts in zip(boxes.unbind(), scores.unbind(), survive.unbind()):
        for part, found, kept in zip(image.split(sizes), *(p.split(sizes) for p in parts)):
            kept.index_fill_(0, nms(part, found, nms_iou), True)
    return survive


def _survivors_at_once(
    boxes: Tensor, scores: Tensor, level: Tensor, *, canvas: tuple[int, int], nms_iou: float
) -> Tensor:
    """Return the same with a single wait for the device: the number of survivors is dynamic.

    The only place of a training step of this head that waits. One call serves all images, which lie below each other on
    a larger canvas, and all levels, which lie side by side; large batches are cut into a few calls.
    """
    height, width = canvas
    batch, count = scores.shape
    shift = torch.stack([level * (width + 1), torch.zeros_like(level)] * 2, -1)
    step = max(BOXES_PER_NMS // count, 1)
    survive = torch.zeros_like(scores, dtype=torch.bool)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        row = torch.arange(len(scores[part]), device=boxes.device)[:, None, None] * (height + 1)
        apart = boxes[part] + shift + torch.cat([torch.zeros_like(row), row] * 2, -1)
        kept = nms(apart.flatten(0, 1), scores[part].flatten(), nms_iou)
        survive[part].view(-1).index_fill_(0, kept, True)
    return survive
