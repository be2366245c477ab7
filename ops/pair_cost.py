"""The matching costs of all pairs of targets and slots of their images, in one call of compiled code.

What it computes is written in `models/assign/costs.py`; in PyTorch's operators it takes about eighty of them. On a GPU
that is eighty launches, on the host as many ways through memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .assignment import gpu_solver_ready, host_solver_ready

PAIR_COSTS = "assigndetr::pair_costs"
torch.library.define(
    PAIR_COSTS,
    "(Tensor logits, Tensor boxes, Tensor labels, Tensor targets, Tensor image, float class_weight, float l1_weight,"
    " float giou_weight, float giou_eps) -> Tensor",
)


def pair_costs_ready(device: torch.device) -> bool:
    """Return whether `pair_costs` takes tensors on `device`, building its code if it was not built yet."""
    return host_solver_ready() if device.type == "cpu" else gpu_solver_ready(device)


def pair_costs(
    logits: Tensor,
    boxes: Tensor,
    labels: Tensor,
    targets: Tensor,
    image: Tensor,
    *,
    class_weight: float,
    l1_weight: float,
    giou_weight: float,
    giou_eps: float = 0.0,
) -> Tensor:
    """Return what it costs to give each target to each slot of its image, (M, L, N) float32, without gradient.

    The focal class cost, the L1 distance and the negative GIoU of the boxes, weighted and added (DETR, section 3.1).
    Computed in float32 whatever the types; equal pairs cost the same to the bit. A pair that is not finite costs
    something that is not. Nobody waits for a GPU. Ask `pair_costs_ready` first: it loads the code.

    Args:
        logits: (L, B, N, C) of L layers; any strides.
        boxes: (L, B, N, 4) cxcywh, normalised; any strides.
        labels: (M,) int64, below C.
        targets: (M, 4) float32 cxcywh, normalised.
        image: (M,) int64, of each target, below B.

    Raises:
        ValueError: if shapes, types or devices do not fit together.
        IndexError: on the CPU, if a label or an image does not exist; a GPU stops with an assertion.
    """
    logits, boxes, targets = logits.detach(), boxes.detach(), targets.detach()
    numbers = (class_weight, l1_weight, giou_weight, giou_eps)
    return torch.ops.assigndetr.pair_costs(logits, boxes, labels, targets, image, *numbers)


@torch.library.impl(PAIR_COSTS, "default")
def _pair_costs(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, image: Tensor, *numbers: float):
    kernel = getattr(torch.ops.assigndetr_ext, f"pair_costs_{logits.device.type}")
    return kernel(logits, boxes, labels.contiguous(), targets.contiguous(), image.contiguous(), *numbers)


@torch.library.register_fake(PAIR_COSTS)
def _pair_costs_shape(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, image: Tensor, *numbers: float):
    return logits.new_empty((len(labels), logits.shape[0], logits.shape[2]), dtype=torch.float32)
