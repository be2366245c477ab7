"""Loss functions on predictions and matched targets: pure functions, one number per decoder layer and slot.

Every term has the signature `(predictions, pairs, assignment) -> {name: (L, N)}` and returns sums over the images. The
criterion adds the slots of a set and divides: one evaluation serves all sets that were decoded together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torchvision.ops import sigmoid_focal_loss

from ops.module import at_least_float32
from util.boxes import cxcywh_to_xyxy, paired_giou, paired_iou
from util.structures import Assignment, Predictions, TargetPairs

LossTerm = Callable[[Predictions, TargetPairs, Assignment], dict[str, Tensor]]

SMALLEST_UNION = 1e-6  # of the IoU that is a class target (Co-DETR), normalised


def focal_classification(
    predictions: Predictions, pairs: TargetPairs, assignment: Assignment, *, alpha: float = 0.25, gamma: float = 2.0
) -> dict[str, Tensor]:
    """Return `loss_ce` (L, N): the sigmoid focal loss summed over all images and classes.

    The target is 1 at the label of a matched slot and 0 everywhere else (RetinaNet; Deformable-DETR, section 5); the
    weight of a pair takes the place of 1. With `alpha` -1 positives and negatives count the same.
    Empty slots (`predictions.padding`) and `assignment.ignore` count nothing.
    """
    logits = at_least_float32(predictions.logits)
    if assignment.weight is None:
        target = torch.zeros_like(logits)
        target[assignment.layer, assignment.image, assignment.slot, pairs.labels] = 1.0
    else:
        target, _ = _class_targets(logits, predictions, pairs, assignment, quality=False)
    loss = sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma, reduction="none")
    return {"loss_ce": _without_ignored(loss, predictions, assignment).sum((1, 3))}


def soft_classification(
    predictions: Predictions,
    pairs: TargetPairs,
    assignment: Assignment,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    quality: bool = False,
) -> dict[str, Tensor]:
    """Return `loss_ce` (L, N): the quality focal loss with targets T in [0, 1], summed over all images and classes.

    alpha |T - p|^gamma BCE(p, T) where T > 0, else (1 - alpha) p^gamma BCE(p, 0): the focal loss where T is 0 or 1.
    With `alpha` -1 both factors are 1, as in Generalized Focal Loss (arXiv 2006.04388, equation 2).
    T is the largest `assignment.score` (or `weight`, or 1) of the pairs of a slot and a class. Where a pair says -1 and
    no other says more, that class of the slot is left out.

    Args:
        quality: T times the IoU of the predicted box with its target.
    """
    logits = at_least_float32(predictions.logits)
    target, left_out = _class_targets(logits, predictions, pairs, assignment, quality)
    p = logits.sigmoid()
    of_positive, of_negative = _balance(alpha)
    factor = torch.where(target > 0, of_positive * (target - p).abs() ** gamma, of_negative * p**gamma)
    loss = factor * binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss.masked_fill(left_out, 0.0)
    return {"loss_ce": _without_ignored(loss, predictions, assignment).sum((1, 3))}


@torch.no_grad()
def _class_targets(
    logits: Tensor, predictions: Predictions, pairs: TargetPairs, assignment: Assignment, quality: bool
) -> tuple[Tensor, Tensor]:
    """Return T, and what is left out of the class loss, (L, B, N, C) each."""
    score = assignment.weight if assignment.score is None else assignment.score
    score = torch.ones_like(pairs.boxes[:, 0]) if score is None else score.to(logits.dtype)
    if quality:
        boxes = at_least_float32(predictions.boxes[assignment.layer, assignment.image, assignment.slot])
        iou = paired_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(pairs.boxes), SMALLEST_UNION)
        score = torch.where(score > 0, score * iou, score)
    _, images, slots, classes = logits.shape
    cell = ((assignment.layer * images + assignment.image) * slots + assignment.slot) * classes + pairs.labels
    target = torch.zeros_like(logits).flatten()
    # The same slot may serve several objects of one class.
    target = target.scatter_reduce(0, cell, score.clamp(min=0), "amax").view_as(logits)
    declined = torch.zeros_like(logits).flatten().scatter_reduce(0, cell, score, "amin").view_as(logits)
    return target, (declined < 0) & (target == 0)


def pairwise_classification(
    predictions: Predictions, pairs: TargetPairs, assignment: Assignment, *, alpha: float = 0.25, gamma: float = 2.0
) -> dict[str, Tensor]:
    """Return `loss_ce` (L, N): for each pair its weight times the focal loss of all classes of the slot.

    The weight may carry gradient. Slots without a pair are background.
    """
    logits = at_least_float32(predictions.logits)
    p = logits.sigmoid()
    of_positive, of_negative = _balance(alpha)
    negative = of_negative * p**gamma * softplus(logits)
    background = negative.sum(-1)
    where = (assignment.layer, assignment.image, assignment.slot)
    own, own_p = logits[(*where, pairs.labels)], p[(*where, pairs.labels)]
    positive = of_positive * (1 - own_p) ** gamma * softplus(-own)
    loss = background[where] + positive - negative[(*where, pairs.labels)]
    weight = torch.ones_like(loss) if assignment.weight is None else assignment.weight
    taught = torch.zeros_like(background).index_put(where, weight.detach(), accumulate=True) > 0
    values = background.masked_fill(taught, 0.0).index_put(where, weight * loss, accumulate=True)
    return {"loss_ce": _without_ignored(values[..., None], predictions, assignment).sum((1, 3))}


def _balance(alpha: float) -> tuple[float, float]:
    """Return the factors of positives and negatives; below 0 stands for 1 and 1, as in torchvision's focal loss."""
    return (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)


def _without_ignored(loss: Tensor, predictions: Predictions, assignment: Assignment) -> Tensor:
    """Return `loss` (L, B, N, ...) with 0 at slots that do not count."""
    if predictions.padding is not None:
        loss = loss.masked_fill(predictions.padding[None, :, :, None], 0.0)
    if assignment.ignore is not None:
        loss = loss.masked_fill(assignment.ignore[..., None], 0.0)
    return loss


def box_regression(
    predictions: Predictions, pairs: TargetPairs, assignment: Assignment, *, giou_eps: float = 0.0
) -> dict[str, Tensor]:
    """Return `loss_bbox` and `loss_giou`, (L, N) each: sums over the matched pairs of L1 of cxcywh and of 1 - GIoU."""
    boxes = at_least_float32(predictions.boxes[assignment.layer, assignment.image, assignment.slot])
    l1 = (boxes - pairs.boxes).abs().sum(-1)
    giou = 1 - paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(pairs.boxes), giou_eps)
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
    if assignment.weight is not None:
        here = here & (assignment.weight > 0)
    best = logits[layer].argmax(-1)  # of all slots: gathering all classes of every pair is slower where pairs are many
    right = (best[assignment.image, assignment.slot] == pairs.labels) & here
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
