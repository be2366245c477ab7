"""Loss functions on predictions and matched targets: pure functions, one number per decoder layer and slot.

Every term has the signature `(predictions, pairs, assignment) -> {name: (L, N)}` and returns sums over the images. The
criterion adds the slots of a set and divides: one evaluation serves all sets that were decoded together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ops.module import at_least_float32
from util.boxes import cxcywh_to_xyxy, paired_giou
from util.structures import Assignment, Predictions, TargetPairs

LossTerm = Callable[[Predictions, TargetPairs, Assignment], dict[str, Tensor]]


def focal_classification(
    predictions: Predictions, pairs: TargetPairs, assignment: Assignment, *, alpha: float = 0.25, gamma: float = 2.0
) -> dict[str, Tensor]:
    """Return `loss_ce` (L, N): the sigmoid focal loss summed over all images and classes.

    The target is 1 at the label of a matched slot and 0 everywhere else (RetinaNet; Deformable-DETR, section 5).
    Empty slots (`predictions.padding`) and `assignment.ignore` count nothing.
    """
    logits = at_least_float32(predictions.logits)
    target = torch.zeros_like(logits)
    where = (assignment.layer, assignment.image, assignment.slot, pairs.labels)
    target[where] = 1.0 if assignment.weight is None else assignment.weight.to(target.dtype)
    loss = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma, reduction="none")
    if predictions.padding is not None:
        loss = loss.masked_fill(predictions.padding[None, :, :, None], 0.0)
    if assignment.ignore is not None:
        loss = loss.masked_fill(assignment.ignore[..., None], 0.0)
    return {"loss_ce": loss.sum((1, 3))}


def box_regression(predictions: Predictions, pairs: TargetPairs, assignment: Assignment) -> dict[str, Tensor]:
    """Return `loss_bbox` and `loss_giou`, (L, N) each: sums over the matched pairs of L1 of cxcywh and of 1 - GIoU."""
    boxes = at_least_float32(predictions.boxes[assignment.layer, assignment.image, assignment.slot])
    l1 = (boxes - pairs.boxes).abs().sum(-1)
    giou = 1 - paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(pairs.boxes))
    if assignment.weight is not None:
        l1, giou = l1 * assignment.weight, giou * assignment.weight
    return {
        "loss_bbox": _per_slot(l1, predictions, assignment),
        "loss_giou": _per_slot(giou, predictions, assignment),
    }


def _per_slot(values: Tensor, predictions: Predictions, assignment: Assignment) -> Tensor:
    """Sum `values` (P,) by layer and slot; without any pair the graph to the boxes is kept, with value 0."""
    layers, slots = predictions.layers, predictions.boxes.shape[2]
    start = values.new_zeros(layers * slots)
    return start.index_add(0, assignment.layer * slots + assignment.slot, values).view(layers, slots)


@torch.no_grad()
def class_error(logits: Tensor, pairs: TargetPairs, assignment: Assignment, layer: int) -> Tensor:
    """Return 100 - top-1 accuracy, in percent, of the matched slots of one layer; 100 when nothing is matched.

    Args:
        logits: (L, B, N, C).
        layer: index of the layer looked at.
    """
    here = assignment.layer == layer
    right = (logits[assignment.layer, assignment.image, assignment.slot].argmax(-1) == pairs.labels) & here
    return 100 - 100 * right.sum() / here.sum().clamp(min=1)


@torch.no_grad()
def cardinality_error(logits: Tensor, counts: Tensor) -> Tensor:
    """Return (L,): the mean over images of |objects - slots whose best class is not the last one|.

    A leftover of DETR's softmax (meaningless with a focal loss) that is part of the family's logs.

    Args:
        logits: (L, B, N, C).
        counts: (B,) number of objects of each image.
    """
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (found - counts).abs().float().mean(-1)
