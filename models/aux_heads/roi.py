"""Second stage of Faster R-CNN: class and box of each proposal, from 7 x 7 features (Fast R-CNN; FPN, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, roi_align

from models.aux_heads.anchors import DeltaCoder, assign_max_iou, giou_loss, pairwise_iou
from models.aux_heads.base import AuxOutput, Objects, Pyramid, Samples
from models.aux_heads.rpn import Proposals
from models.aux_heads.sampling import Sampled, sample
from ops.module import at_least_float32
from ops.transfer import send
from util.structures import Detections

GRID = 7  # cells of a region's feature, per side


@dataclass(frozen=True)
class RoISettings:
    """Published numbers of the second stage in Co-Deformable-DETR; Co-DINO has a finest scale of 56."""

    finest_scale: float = 112.0  # pixels: regions of up to twice this side look at the finest map
    hidden: int = 1024
    samples: int = 512  # of an image
    fraction: float = 0.25  # largest share of positives
    positive_iou: float = 0.5
    stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
    class_weight: float = 1.0
    box_weight: float = 10.0
    nms_iou: float = 0.5  # of detections
    keep: int = 100  # detections of an image


def region_levels(boxes: Tensor, *, finest_scale: float, levels: int) -> Tensor:
    """Return the map that each box (..., 4) looks at, (...) int64: one level up for each doubling (FPN, equation 1)."""
    side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).clamp(min=0).sqrt()
    return torch.log2(side / finest_scale + 1e-6).floor().clamp(0, levels - 1).long()


def pool_regions(maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, *, finest_scale: float) -> Tensor:
    """Return what RoIAlign reads for each box from the map of its level, (B, R, D, 7, 7), at least float32.

    Every map is asked about every box, but a box of another level is empty there: RoIAlign takes `ceil(size / 7)`
    samples per cell and side, so none, and gives 0 and no gradient. This costs writing zeros, not sampling (a fifth
    of the time on a CPU: 2 x 512 boxes, 256 channels), and spares the device synchronisation of sorting by level.

    Args:
        maps: (B, D, h, w) each, finest first.
        strides: of the maps, in pixels.
        boxes: (B, R, 4) xyxy in pixels.
        finest_scale: see `region_levels`.
    """
    batch, count = boxes.shape[:2]
    image = torch.arange(batch, device=boxes.device)[:, None].expand(batch, count).reshape(-1, 1)
    levels = region_levels(boxes, finest_scale=finest_scale, levels=len(maps))
    pooled = None
    for i, (features, stride) in enumerate(zip(maps, strides)):
        features = at_least_float32(features)
        regions = torch.cat([image, (boxes * (levels == i)[..., None]).flatten(0, 1)], 1).to(features.dtype)
        found = roi_align(features, regions, GRID, 1 / stride, sampling_ratio=0, aligned=True)
        pooled = found if pooled is None else pooled + found
    return pooled.unflatten(0, (batch, count))


class RoIHead(nn.Module):
    """Two hidden layers, a softmax over classes and background (last), a box of its own for every class.

    Args:
        num_classes: C, without background.
        width: D, channels of the maps.
        strides: of the maps it looks at, finest first; further maps of the pyramid are not used.
        settings: see there.
    """

    def __init__(self, *, num_classes: int, width: int, strides: tuple[int, ...], settings: RoISettings) -> None:
        super().__init__()
        self.num_classes, self.strides, self.settings = num_classes, strides, settings
        self.coder = DeltaCoder(stds=settings.stds)
        widths = (width * GRID * GRID, settings.hidden, settings.hidden)
        self.shared_fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.fc_cls = nn.Linear(settings.hidden, num_classes + 1)
        self.fc_reg = nn.Linear(settings.hidden, num_classes * 4)
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*self.shared_fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)

    def classify(self, pyramid: Pyramid, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (B, R, C + 1), deltas (B, R, C, 4) and pooled features (B, R, D, 7, 7) of boxes (B, R, 4)."""
        maps = pyramid.maps[: len(self.strides)]
        pooled = pool_regions(maps, self.strides, boxes, finest_scale=self.settings.finest_scale)
        hidden = pooled.flatten(2)
        for layer in self.shared_fcs:
            hidden = layer(hidden).relu()
        deltas = self.fc_reg(hidden).unflatten(-1, (self.num_classes, 4))
        return at_least_float32(self.fc_cls(hidden)), at_least_float32(deltas), pooled

    def forward(self, pyramid: Pyramid, objects: Objects, proposals: Proposals) -> AuxOutput:
        """Return losses `loss_cls`, `loss_bbox`, the sampled regions with their logits, and logs `acc`.

        The objects themselves are put in front of the proposals. All S sampled regions of an image are taught; what is
        handed on is cut to the smallest number sampled in an image of the batch (positives first), as published: later
        slots are neither positive nor negative.
        """
        boxes, picked, target = self.choose(objects, proposals)
        logits, deltas, pooled = self.classify(pyramid, boxes)
        losses, logs = self.losses(logits, deltas, boxes, objects, picked, target)
        taken = picked.taken.sum(1)
        kept = torch.arange(boxes.shape[1], device=boxes.device) < taken.min()
        positive, negative = picked.positive & kept, picked.negative & kept
        samples = Samples(boxes, positive, negative, target * positive, pooled.mean((-2, -1)))
        return AuxOutput(losses, samples, logits, logs)

    @torch.no_grad()
    def choose(self, objects: Objects, proposals: Proposals) -> tuple[Tensor, Sampled, Tensor]:
        """Return sampled boxes (B, S, 4), 0 in empty slots, their sampling, and their objects (B, S) int64."""
        boxes = torch.cat([objects.boxes, proposals.boxes], 1)
        valid = torch.cat([objects.valid, proposals.valid], 1)
        limit = self.settings.positive_iou
        target, positive, negative = assign_max_iou(
            pairwise_iou(boxes, objects.boxes),
            objects.valid,
            valid,
            positive=limit,
            negative=limit,
            min_positive=limit,
            low_quality=False,
        )
        picked = sample(positive, negative, total=self.settings.samples, fraction=self.settings.fraction)
        return picked.of(boxes) * picked.taken[..., None], picked, picked.of(target) * picked.positive

    def losses(
        self, logits: Tensor, deltas: Tensor, boxes: Tensor, objects: Objects, picked: Sampled, target: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return softmax cross-entropy and GIoU loss, both divided by the number of regions sampled in the batch."""
        labels = objects.labels.gather(1, target).masked_fill(~picked.positive, self.num_classes)
        count = picked.taken.sum().clamp(min=1)
        entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        own = labels.clamp(max=self.num_classes - 1)[..., None, None].expand(-1, -1, 1, 4)
        found = self.coder.decode(boxes, deltas.gather(2, own).squeeze(2))
        wanted = objects.boxes.gather(1, target[..., None].expand(-1, -1, 4))
        losses = {
            "loss_cls": self.settings.class_weight * (entropy * picked.taken).sum() / count,
            "loss_bbox": self.settings.box_weight * (giou_loss(found, wanted) * picked.positive).sum() / count,
        }
        right = (logits.detach().argmax(-1) == labels) & picked.taken
        return losses, {"acc": 100 * right.sum() / count}

    @torch.no_grad()
    def predict(self, pyramid: Pyramid, proposals: Proposals) -> list[Detections]:
        """Return the best detections of each image after NMS per class; waits for the device."""
        logits, deltas, _ = self.classify(pyramid, proposals.boxes)
        scores = logits.softmax(-1)[..., :-1] * proposals.valid[..., None]
        sizes = send(torch.tensor(pyramid.sizes), deltas.device)
        boxes = self.coder.decode(proposals.boxes[:, :, None], deltas, clip=sizes)
        return [self._best(s, b) for s, b in zip(scores, boxes)]

    def _best(self, scores: Tensor, boxes: Tensor) -> Detections:
        """Select from scores (R, C) and boxes (R, C, 4) of one image."""
        region, label = (scores > 0).nonzero(as_tuple=True)
        scores, boxes = scores[region, label], boxes[region, label]
        kept = batched_nms(boxes, scores, label, self.settings.nms_iou)[: self.settings.keep]
        return Detections(scores[kept], label[kept], boxes[kept])
