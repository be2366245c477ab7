"""FCOS as an auxiliary head: anchor-free, every cell is a point (Tian et al. 2019; Co-DETR, table 1).

With centre sampling, distances in units of the stride, and centreness from the box tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from models.aux_heads.anchors import AnchorGrid, giou_loss
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
)
from util.structures import Detections

QUERY_SCALE = 8  # side of the box handed to the decoder, in strides (Co-DETR, table 1)
REACH = 8  # a level takes objects whose farthest side is up to so many strides away, from half of that on


class FCOSHead(DenseHead):
    """Points inside the centre region of an object regress its four sides.

    Args:
        num_classes: C.
        width: channels of pyramid and towers, a multiple of 32.
        strides: of the levels, each twice the one before.
        stacked_convs: convolutions of each tower.
        radius: half side of the centre region, in strides.
        class_weight, box_weight, centerness_weight: of the three losses.
    """

    name = "fcos"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        stacked_convs: int = 1,
        radius: float = 1.5,
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 1.0,
    ) -> None:
        grid = AnchorGrid(strides, scales=(QUERY_SCALE,), ratios=(1.0,))
        super().__init__(num_classes=num_classes, width=width, grid=grid, stacked_convs=stacked_convs, norm=True)
        self.radius = radius
        self.class_weight, self.box_weight, self.centerness_weight = class_weight, box_weight, centerness_weight
        self.conv_cls = predictor(width, num_classes)
        self.conv_reg = predictor(width, 4)
        self.conv_centerness = predictor(width, 1)
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.initialise(self.conv_cls)

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return the scalar losses `loss_cls`, `loss_bbox` and `loss_centerness`, and the points as samples."""
        logits, sides, centerness = self._outputs(pyramid)
        points, strides, usable, _ = self._points(pyramid)
        target, positive = assign_points(points, strides, objects, levels=self.grid.strides, radius=self.radius)
        losses = self._losses(logits, sides, centerness, points, strides, objects, target, positive)
        # The losses count padded cells as background, which is published; as decoder queries they would teach nothing.
        half = QUERY_SCALE / 2 * strides[:, None]
        boxes = torch.cat([points - half, points + half], -1).expand(len(logits), -1, -1)
        samples = Samples(boxes, positive, usable & ~positive, target, pyramid.tokens())
        return AuxOutput(losses, samples, logits)

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Return the detections of each image, best first, at most 100. NMS waits for the device."""
        logits, sides, centerness = self._outputs(pyramid)
        points, strides, _, counts = self._points(pyramid)
        boxes = box_around(points, sides * strides[:, None])
        return detect(logits.sigmoid(), boxes, counts, pyramid, quality=centerness.sigmoid(), nms_iou=0.6)

    def _outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits (B, R, C), sides in strides (B, R, 4) and centreness logits (B, R)."""
        classes, boxes = self.towers(pyramid)
        logits = flatten([self.conv_cls(x) for x in classes], self.num_classes)
        sides = flatten([scale(self.conv_reg(x)).relu() for scale, x in zip(self.scales, boxes)], 4)
        return logits, sides, flatten([self.conv_centerness(x) for x in boxes], 1).squeeze(-1)

    def _points(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Return the middles of the cells (R, 2), their strides (R,), usable ones (B, R), and their number by level."""
        anchors, usable, counts = self.place(pyramid)
        strides = strides_of(self.grid.strides, counts, anchors.device)
        return anchors.view(-1, 2, 2).mean(1) + strides[:, None] / 2, strides, usable, counts

    def _losses(
        self,
        logits: Tensor,
        sides: Tensor,
        centerness: Tensor,
        points: Tensor,
        strides: Tensor,
        objects: Objects,
        target: Tensor,
        positive: Tensor,
    ) -> dict[str, Tensor]:
        labels, boxes = objects_of(target, objects)
        count = average_over_processes(positive.sum().float()).clamp(min=1)
        focal = sigmoid_focal_loss(logits, one_hot(labels, positive, self.num_classes))
        wanted = torch.where(positive, centerness_of(distances(points, boxes)), 0.0)
        total = average_over_processes(wanted.sum()).clamp(min=1e-6)
        giou = giou_loss(box_around(points, sides * strides[:, None]), boxes) * wanted
        entropy = F.binary_cross_entropy_with_logits(centerness, wanted, reduction="none") * positive
        return {
            "loss_cls": self.class_weight * focal.sum() / count,
            "loss_bbox": self.box_weight * giou.sum() / total,
            "loss_centerness": self.centerness_weight * entropy.sum() / count,
        }


def centerness_of(sides: Tensor) -> Tensor:
    """Return (...), 1 in the middle of a box and 0 on its border, from distances (..., 4) to its sides.

    FCOS, equation 3; points outside give 0.
    """
    sides = sides.clamp(min=0)
    near = torch.minimum(sides[..., :2], sides[..., 2:])
    far = torch.maximum(sides[..., :2], sides[..., 2:])
    return (near / far.clamp(min=1e-6)).prod(-1).sqrt()


@torch.no_grad()
def assign_points(
    points: Tensor, strides: Tensor, objects: Objects, *, levels: Sequence[int], radius: float
) -> tuple[Tensor, Tensor]:
    """Give each point the smallest object whose centre region it is in and whose size suits its level.

    The centre region is the square of half side `radius` strides around the object's centre, clipped to the object. A
    level with stride s takes objects whose farthest side is 4 s to 8 s away (both included), the finest one from 0 on
    and the coarsest without limit: (0, 64), (64, 128).. with strides 8, 16.. (FCOS, section 3.2).

    Args:
        points: (R, 2), pixels.
        strides: (R,) of the points' levels.
        levels: all strides, finest first.

    Returns:
        Index of the object (B, R), 0 where there is none, and which points are positive (B, R).
    """
    boxes = objects.boxes[:, None]  # (B, 1, M, 4)
    sides = distances(points[:, None], boxes)  # (B, R, M, 4)
    reach = radius * strides[:, None, None]
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    region = torch.cat(
        [torch.maximum(centers - reach, boxes[..., :2]), torch.minimum(centers + reach, boxes[..., 2:])], -1
    )
    inside = distances(points[:, None], region).amin(-1) > 0
    lower = torch.where(strides == levels[0], 0.0, strides * REACH / 2)[:, None]
    upper = torch.where(strides == levels[-1], torch.inf, strides * REACH)[:, None]
    farthest = sides.amax(-1)
    fits = inside & (farthest >= lower) & (farthest <= upper) & objects.valid[:, None]
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    smallest, target = torch.where(fits, area, torch.inf).min(-1)
    positive = smallest < torch.inf
    return torch.where(positive, target, 0), positive
