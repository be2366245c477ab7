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
| `agree_small`, `regret_small` | the same for small objects, where the paper loses | |
| `flip` (util/flips.py) | below that of `--matcher hungarian` | |
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.assign.dense import PaddedTargets
from models.assign.hungarian import UNMATCHABLE, match
from util.boxes import cxcywh_to_xyxy, paired_iou
from util.structures import Assignment, FlatTargets

DETECTED = 0.3  # score from which a slot counts as a detection
SAME_OBJECT = 0.5  # IoU from which it is one of an object
EPS = 1e-8
SMALL = 32**2  # largest area of what COCO calls small, in pixels of the file


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
def duplicates(logits: Tensor, boxes: Tensor, targets: PaddedTargets) -> Tensor:
    """Return, per target, how many detections of it are one too many (a scalar); any matcher may be asked.

    Args:
        logits: (B, N, C) of one layer.
        boxes: (B, N, 4) cxcywh.
        targets: of the B images.
    """
    own, valid = targets.boxes[:, :, None], targets.valid[..., None]
    iou = paired_iou(cxcywh_to_xyxy(boxes[:, None].float()), cxcywh_to_xyxy(own))
    scored = logits[:, None].float().amax(-1).sigmoid() > DETECTED
    detections = ((iou > SAME_OBJECT) & scored & valid).sum(2)
    return (detections - 1).clamp(min=0).sum() / targets.valid.sum().clamp(min=1)


@torch.no_grad()
def against_optimum(weights: Tensor, costs: Tensor, targets: FlatTargets) -> dict[str, Tensor]:
    """Compare an assignment with the optimal one-to-one matching of the same costs; waits for the device.

    Args:
        weights: (B, M, N) of the pairs.
        costs: (B, M, N).
        targets: of the B images.

    Returns:
        `agree`: share of targets whose strongest slot is that of the optimal matching; `regret`: mean cost of a
        target's pairs minus that of the optimal matching, over targets that have a pair. `agree_small`, `regret_small`:
        the same over targets up to the area `SMALL`. What would be a mean over nothing is absent, so that an average
        over batches counts only those that have some.
    """
    device, total = costs.device, weights.sum(2)
    paid = ((weights * costs).sum(2) / total.clamp(min=EPS)).cpu().numpy()
    strongest = weights.argmax(2).masked_fill(weights.amax(2) <= 0, -1).cpu().numpy()
    costs = costs.nan_to_num(UNMATCHABLE, UNMATCHABLE, -UNMATCHABLE).cpu().numpy()
    agree, regret = [np.zeros(0)], [np.zeros(0)]  # of every target
    for image, size in enumerate(targets.sizes):
        if size == 0:
            continue
        slots, rows = match(costs[image, :size])
        agree.append(np.zeros(size))
        agree[-1][rows] = strongest[image][rows] == slots
        regret.append(np.full(size, np.nan))
        regret[-1][rows] = paid[image][rows] - costs[image][rows, slots]
        regret[-1][strongest[image, :size] < 0] = np.nan  # `unassigned` counts these
    measures = {"agree": np.concatenate(agree), "regret": np.concatenate(regret)}
    small = (targets.file_area() <= SMALL).cpu().numpy()
    numbers = {}
    for name, values in measures.items():
        for key, own in ((name, values), (f"{name}_small", values[small])):
            if not np.isnan(own).all():  # also where there are none
                numbers[key] = np.nanmean(own)
    return dict(zip(numbers, torch.tensor(list(numbers.values()), dtype=torch.float32).to(device)))


@torch.no_grad()
def chosen_slots(pairs: Assignment, layer: int, targets: FlatTargets) -> Tensor:
    """Return the slot of the strongest pair of every target on one layer, (M,) int64, -1 without any.

    Args:
        pairs: of a set.
        layer: as the pairs count layers.
        targets: of the batch, M in all images.
    """
    target = targets.starts[pairs.image] + pairs.target
    weight = torch.ones_like(target, dtype=torch.float32) if pairs.weight is None else pairs.weight
    weight = torch.where(pairs.layer == layer, weight, 0.0)
    nothing = torch.zeros_like(targets.labels)
    most = nothing.float().scatter_reduce(0, target, weight, "amax")
    strongest = (weight > 0) & (weight == most[target])
    return (nothing - 1).scatter_reduce(0, target, torch.where(strongest, pairs.slot, -1), "amax")
