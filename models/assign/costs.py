"""Terms of the matching cost between slots and targets (DETR, section 3.1; focal class cost of Deformable-DETR).

All take float32 predictions of one image with any leading dimensions and return (..., N, M).
"""

from __future__ import annotations

from torch import Tensor

from util.boxes import cxcywh_to_xyxy, pairwise_giou

# Fixed in the matcher, independent of the focal loss's own alpha (published).
ALPHA, GAMMA, EPS = 0.25, 2.0, 1e-8


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal cost of giving slot n the label of target m; `logits` (..., N, C), `labels` (M,)."""
    p = logits[..., labels].sigmoid()
    positive = ALPHA * (1 - p) ** GAMMA * -(p + EPS).log()
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p + EPS).log()
    return positive - negative


def l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the L1 distance of cxcywh boxes, (..., N, 4) against (M, 4)."""
    return (boxes[..., :, None, :] - targets).abs().sum(-1)


def giou_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return -GIoU of cxcywh boxes, (..., N, 4) against (M, 4)."""
    return -pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))
