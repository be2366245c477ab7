"""Box arithmetic on tensors: conversions, generalised IoU and the clamped inverse of the sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Return (..., 4) centre boxes as (..., 4) corner boxes, in the same unit."""
    return box_convert(boxes, "cxcywh", "xyxy")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Return (..., 4) corner boxes as (..., 4) centre boxes, in the same unit."""
    return box_convert(boxes, "xyxy", "cxcywh")


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of all pairs, (N, M), of corner boxes (N, 4) and (M, 4)."""
    return box_iou(a, b)


def paired_giou(a: Tensor, b: Tensor, eps: float = 0.0) -> Tensor:
    """Return the generalised IoU, (...), of the corner boxes `a` and `b`, (..., 4) each or broadcast to it.

    `eps` is added to both denominators (DAB-DETR and DINO: 1e-6).

    No assertion on well-formed boxes: a check would synchronise with the device. Non-finite boxes give non-finite
    values, which the training step finds and names.
    """
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = a.unbind(-1), b.unbind(-1)
    inter, union = _inter_union(a, b)
    width = (torch.maximum(right_a, right_b) - torch.minimum(left_a, left_b)).clamp(min=0)
    height = (torch.maximum(bottom_a, bottom_b) - torch.minimum(top_a, top_b)).clamp(min=0)
    hull = width * height
    return inter / (union + eps) - (hull - union) / (hull + eps)


def paired_iou(a: Tensor, b: Tensor, smallest_union: float = 0.0) -> Tensor:
    """Return the IoU, (...), of the corner boxes `a` and `b`, (..., 4) each or broadcast to it.

    The union is taken as at least `smallest_union` (Co-DETR: 1e-6): two boxes without area have an IoU of 0, not NaN.
    """
    inter, union = _inter_union(a, b)
    return inter / union.clamp(min=smallest_union)


def _inter_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (left_a, top_a, right_a, bottom_a), (left_b, top_b, right_b, bottom_b) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)).clamp(min=0)
    height = (torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)).clamp(min=0)
    inter = width * height
    return inter, (right_a - left_a) * (bottom_a - top_a) + (right_b - left_b) * (bottom_b - top_b) - inter


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of `x` after clamping it to [0, 1]; both sides of the quotient are at least `eps`.

    The clamp is part of the published numbers (Deformable-DETR, refinement).
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
