"""From encoder tokens to ranked proposals: the first stage of the two-stage model (Deformable-DETR, 4.2 and A.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from util.structures import LevelShapes

BASE_SIZE = 0.05  # side of a proposal on the finest level, as a share of the image; doubles with every level
BORDER = 0.01  # proposals with a number outside (BORDER, 1 - BORDER) are invalid


def proposal_logits(padding: Tensor, shapes: LevelShapes) -> tuple[Tensor, Tensor]:
    """Return one prior box per token in logit space, and which tokens have none.

    Args:
        padding: (B, S) bool, True at padding.
        shapes: (h, w) per level.

    Returns:
        (B, S, 4) logits of cxcywh in float32, +inf (all four) where the token is padding or the box is not inside
        (0.01, 0.99); and (B, S) bool, True at exactly those tokens. +inf is legal: its sigmoid is 1 and its gradient 0,
        but it must never pass through arithmetic other than a sum and a sigmoid.
    """
    boxes = []
    for level, (part, (height, width)) in enumerate(zip(padding.split([h * w for h, w in shapes], dim=1), shapes)):
        part = part.unflatten(1, (height, width))
        valid_rows, valid_columns = (~part[:, :, 0]).sum(1), (~part[:, 0, :]).sum(1)
        y = (torch.arange(height, dtype=torch.float32, device=padding.device) + 0.5)[None] / valid_rows[:, None]
        x = (torch.arange(width, dtype=torch.float32, device=padding.device) + 0.5)[None] / valid_columns[:, None]
        centre = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
        boxes.append(torch.cat([centre, torch.full_like(centre, BASE_SIZE * 2.0**level)], -1).flatten(1, 2))
    box = torch.cat(boxes, 1)
    invalid = ~((box > BORDER) & (box < 1 - BORDER)).all(-1) | padding
    logits = torch.log(box / (1 - box)).masked_fill(invalid[..., None], torch.inf)
    return logits, invalid


def select_top(scores: Tensor, count: int) -> Tensor:
    """Return the indices (B, min(count, S)) of the best `scores` (B, S), best first.

    The order of equal scores is not defined. One small function on purpose: a test that pins the order replaces it.
    """
    # While a graph for any size is recorded, the number of tokens is a symbol; that of queries must not become one too.
    if isinstance(scores.shape[1], int):
        count = min(count, scores.shape[1])
    return scores.topk(count, dim=1).indices


def select_unused(scores: Tensor, used: Sequence[Tensor], count: int) -> Tensor:
    """Return the indices of the best `count` of `scores` (B, S) that are in no row of `used` [(B, K)], best first.

    Fewer if not so many are left (H-DETR, supplement: the top n (K + 1) without those of the one-to-one queries).
    """
    if used:
        taken = torch.cat(list(used), 1)
        scores = scores.scatter(1, taken, -torch.inf)
        count = min(count, scores.shape[1] - taken.shape[1])
    return select_top(scores, count)


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Return the rows `index` (B, K) of `values` (B, S, F) as (B, K, F)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
