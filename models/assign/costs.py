"""Terms of the matching cost of pairs (DETR, section 3.1; focal class cost of Deformable-DETR).

All are elementwise on float32: their arguments belong together or broadcast.
"""

from __future__ import annotations

from torch import Tensor

from util.boxes import paired_giou

# Fixed in the matcher, independent of the focal loss's own alpha (published).
ALPHA, GAMMA, EPS = 0.25, 2.0, 1e-8


def class_cost(logits: Tensor) -> Tensor:
    """Return the focal cost of the class whose logit is given, same shape."""
    return probability_cost(logits.sigmoid())


def probability_cost(p: Tensor) -> Tensor:
    """Return the focal cost of the class whose probability is given, same shape."""
    positive = ALPHA * (1 - p) ** GAMMA * -(p + EPS).log()
    negative = (1 - ALPHA) * p**GAMMA * -(1 - p + EPS).log()
    return positive - negative


def l1_cost(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the L1 distance, (...), of cxcywh boxes (..., 4)."""
    return (boxes - targets).abs().sum(-1)


def giou_cost(boxes: Tensor, targets: Tensor, eps: float = 0.0) -> Tensor:
    """Return -GIoU, (...), of xyxy boxes (..., 4)."""
    return -paired_giou(boxes, targets, eps)
