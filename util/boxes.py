"""Box arithmetic on tensors: conversions, generalised IoU and the clamped inverse of the sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou, generalized_box_iou


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Return (..., 4) centre boxes as (..., 4) corner boxes, in the same unit."""
    return box_convert(boxes, "cxcywh", "xyxy")


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of all pairs, (N, M), of corner boxes (N, 4) and (M, 4)."""
    return box_iou(a, b)


def pairwise_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU of all pairs, (..., N, M), of corner boxes (..., N, 4) and (M, 4)."""
    flat = generalized_box_iou(a.reshape(-1, 4), b)
    return flat.reshape(*a.shape[:-1], len(b))


def paired_giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU, (P,), of the corner boxes (P, 4) `a` and `b`, row by row.

    No assertion on well-formed boxes: a check would synchronise with the device. Non-finite boxes give non-finite
    values, which the training step finds and names.
    """
    left_top, right_bottom = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    inter = (right_bottom - left_top).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inter
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])
    hull_area = hull.clamp(min=0).prod(1)
    return inter / union - (hull_area - union) / hull_area


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of `x` after clamping it to [0, 1]; both sides of the quotient are at least `eps`.

    The clamp is part of the published numbers (Deformable-DETR, refinement).
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
