"""Numbers that tell whether an assignment without a solver is healthy.

| | healthy | alarm |
|---|---|---|
| `distinct` | 1 with rounds, above 0.85 with colpeak | below 0.7: the probe has collapsed |
| `unassigned` | 0 | above 0.02 |
| `c_max` | rises to 0.8-0.95 | above 0.99 in the first tenth: saturated |
| `pos_per_gt` | 1, up to 5 with extra positives | |
| `dup` | below 0.2 | rising |
| `agree` | above 0.8 late | below 0.3 late |
| `regret` | falls to some per cent of the optimal cost | grows |
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.assign.dense import PaddedTargets, Slots
from models.assign.hungarian import UNMATCHABLE, match
from util.boxes import cxcywh_to_xyxy, paired_iou

DETECTED = 0.3  # score from which a slot counts as a detection
SAME_OBJECT = 0.5  # IoU from which it is one of an object


@torch.no_grad()
def health(kept: Tensor, valid: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Return the measures of learned correspondences, device scalars.

    Args:
        kept: (B, M, N) bool, chosen pairs of one layer.
        valid: (B, M).
        c: (B, M, N) dense correspondence.

    Returns:
        `distinct`: chosen slots per target, each slot counted once; `unassigned`: share of targets without any slot;
        `c_max`: mean over targets of their strongest correspondence; `pos_per_gt`: pairs per target.
    """
    count = valid.sum().clamp(min=1)
    return {
        "distinct": kept.any(1).sum() / count,
        "unassigned": (valid & ~kept.any(2)).sum() / count,
        "c_max": (c.amax(2) * valid).sum() / count,
        "pos_per_gt": kept.sum() / count,
    }


@torch.no_grad()
def duplicates(slots: Slots, targets: PaddedTargets) -> Tensor:
    """Return, per target, how many detections of it on the last layer are one too many (a scalar)."""
    images = len(targets.sizes)
    boxes, labels = targets.boxes[:, :, None], targets.valid[..., None]
    found = slots.boxes[-images:, None]
    iou = paired_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
    scored = slots.logits[-images:, None].amax(-1).sigmoid() > DETECTED
    detections = ((iou > SAME_OBJECT) & scored & labels).sum(2)
    return (detections - 1).clamp(min=0).sum() / targets.valid.sum().clamp(min=1)


@torch.no_grad()
def against_optimum(weights: Tensor, costs: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """Compare an assignment with the optimal one-to-one matching of the same costs; waits for the device.

    Args:
        weights: (B, M, N) of the pairs.
        costs: (B, M, N).
        sizes: number of targets of each image.

    Returns:
        `agree`: share of targets whose strongest slot is that of the optimal matching; `regret`: cost of the weighted
        pairs minus that of the optimal matching, per target.
    """
    device, total = costs.device, max(sum(sizes), 1)
    strongest = weights.argmax(2).masked_fill(weights.amax(2) <= 0, -1).cpu().numpy()
    paid, costs = (weights * costs).sum().item(), costs.nan_to_num(UNMATCHABLE, UNMATCHABLE, -UNMATCHABLE).cpu().numpy()
    agree, optimum = 0, 0.0
    for image, size in enumerate(sizes):
        if size == 0:
            continue
        slots, rows = match(costs[image, :size])
        agree += int((strongest[image][rows] == slots).sum())
        optimum += float(costs[image][rows, slots].sum())
    numbers = torch.tensor([agree / total, (paid - optimum) / total])
    return dict(zip(("agree", "regret"), numbers.to(device)))
