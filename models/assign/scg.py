"""Sparse choice among the correspondences of targets and slots ("Beyond Hungarian", arXiv 2603.08514, SCG).

The record of the paper allows several readings; each is a function of this file. All work on `G` images (and layers)
at once: scores (G, M, N) of M padded targets and N slots, `valid` (G, M). Nothing waits for the device, and what is
chosen carries no gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Competition = Literal["none", "dual", "center", "sinkhorn"]
Norm = Literal["row", "column", "global", "none"]

NEG = -1e9  # score of what may not be chosen
SINKHORN_STEPS = 4
EPS = 1e-8


def compete(logits: Tensor, valid: Tensor, how: Competition, empty: Tensor | None = None) -> Tensor:
    """Return log C (G, M, N): a log-softmax over slots after targets have competed for them.

    A softmax over slots alone lets all targets want the same slot, which is how a young probe collapses.

    Args:
        logits: (G, M, N).
        valid: (G, M).
        how: `none`; `dual`: times a softmax over the valid targets and a dustbin of logit 0; `center`: minus the mean
            over the valid targets, where there are two; `sinkhorn`: rows and columns in turn, with a dustbin row.
        empty: (G, N) bool, slots that nobody may have.
    """
    if empty is not None:
        logits = logits.masked_fill(empty[:, None], NEG)
    if how == "dual":
        logits = logits + _over_targets(logits, valid)
    elif how == "center":
        count = valid.sum(1)[:, None, None]
        mean = (logits * valid[..., None]).sum(1, keepdim=True) / count.clamp(min=1)
        logits = torch.where(count > 1, logits - mean, logits)
    elif how == "sinkhorn":
        logits = logits + _column_potential(logits, valid)
    if empty is not None:  # again: a competition may have cancelled it
        logits = logits.masked_fill(empty[:, None], NEG)
    return logits.log_softmax(-1)


def _over_targets(logits: Tensor, valid: Tensor) -> Tensor:
    """Return the log-softmax over valid targets and a dustbin."""
    masked = logits.masked_fill(~valid[..., None], NEG)
    total = torch.cat([masked, torch.zeros_like(masked[:, :1])], 1).logsumexp(1, keepdim=True)
    return logits - total


def _column_potential(logits: Tensor, valid: Tensor) -> Tensor:
    """Return (G, 1, N): what Sinkhorn's iteration adds to the columns when each target has mass 1, each slot 1."""
    slots = logits.shape[-1]
    rows = torch.cat([logits.masked_fill(~valid[..., None], NEG), torch.zeros_like(logits[:, :1])], 1)
    spare = (slots - valid.sum(1, keepdim=True)).clamp(min=EPS)
    mass = torch.cat([torch.where(valid, 1.0, EPS), spare], 1).log()[..., None]
    columns = torch.zeros_like(logits[:, :1])
    for _ in range(SINKHORN_STEPS):
        own = mass - (rows + columns).logsumexp(2, keepdim=True)
        own = own.masked_fill(torch.cat([~valid, torch.zeros_like(valid[:, :1])], 1)[..., None], 0.0)
        columns = -(rows + own).logsumexp(1, keepdim=True)
    return columns


@torch.no_grad()
def greedy_rounds(
    scores: Tensor, valid: Tensor, rounds: int, taken: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give targets one slot each, in rounds: every target without a slot bids for its best free one, the highest wins.

    Equal bids go to the first target. One round is the mutual choice of row and column.

    Args:
        scores: (G, M, N), logits rather than probabilities, which underflow; at most NEG / 2: never.
        valid: (G, M).
        rounds: what is not placed after so many stays without a slot; M rounds place all if there are enough slots.
        taken: (G, N) bool, slots that are not free.

    Returns:
        The slot of each target (G, M), 0 without one; which targets are placed (G, M); which slots are taken (G, N).
    """
    groups, targets, slots = scores.shape
    row = torch.arange(targets, device=scores.device).expand(groups, targets)
    nobody = scores.new_full((groups, slots), NEG)
    taken = torch.zeros_like(nobody, dtype=torch.bool) if taken is None else taken
    chosen, placed = torch.zeros_like(row), torch.zeros_like(valid)
    for _ in range(min(rounds, targets)):
        bid, slot = scores.masked_fill(taken[:, None], NEG).max(-1)
        bidding = valid & ~placed & (bid > NEG / 2)
        bid = bid.masked_fill(~bidding, NEG)
        highest = nobody.scatter_reduce(1, slot, bid, "amax").gather(1, slot)
        wins = bidding & (bid == highest)
        first = torch.full_like(taken, targets, dtype=row.dtype)
        first = first.scatter_reduce(1, slot, row.masked_fill(~wins, targets), "amin")
        wins &= first.gather(1, slot) == row
        chosen, placed = torch.where(wins, slot, chosen), placed | wins
        taken = taken | (first < targets)
    return chosen, placed, taken


@torch.no_grad()
def colpeak(c: Tensor, valid: Tensor, rho: float) -> Tensor:
    """Return what is kept, (G, M, N) bool: pairs of at least `rho` times the strongest claim on their slot.

    Only slots that are the first choice of some target take part. A slot may serve several targets; a target whose
    first choice is claimed much more strongly by another may get nothing.

    Args:
        c: (G, M, N) correspondence.
    """
    c = c.masked_fill(~valid[..., None], 0.0)
    peak, slot = c.max(-1, keepdim=True)
    peaks = torch.zeros_like(c).scatter(-1, slot, peak).amax(-2, keepdim=True)
    return (peaks > 0) & (c >= rho * peaks) & valid[..., None]


@torch.no_grad()
def rowpeak(c: Tensor, valid: Tensor, rho: float) -> Tensor:
    """Return what is kept, (G, M, N) bool: a slot serves the target that claims it most, if strongly enough.

    That is at least `rho` times the strongest of all slots of that target. A target that claims no slot more than the
    others do gets nothing.
    """
    c = c.masked_fill(~valid[..., None], -1.0)
    owner = c.argmax(-2, keepdim=True)
    mine = owner == torch.arange(c.shape[1], device=c.device)[:, None]
    own = torch.where(mine, c, 0.0)
    return mine & (own >= rho * own.amax(-1, keepdim=True)) & (own > 0) & valid[..., None]


@torch.no_grad()
def strongest(kept: Tensor, c: Tensor, count: int) -> Tensor:
    """Return of `kept` (G, M, N) only the `count` strongest of every target."""
    values, slot = torch.where(kept, c, 0.0).topk(min(count, c.shape[-1]), dim=-1)
    return torch.zeros_like(kept).scatter(-1, slot, values > 0)


def row_weights(log_c: Tensor, kept: Tensor) -> Tensor:
    """Return the correspondences `log_c` (G, M, N) of the pairs `kept` with rows of sum 1, or 0 without any pair.

    From logarithms: a pair that was chosen although its correspondence is too small for a float32 counts in full.
    """
    peak = log_c.detach().masked_fill(~kept, NEG).amax(-1, keepdim=True)
    weights = (log_c - peak).masked_fill(~kept, NEG).exp()
    return weights / weights.sum(-1, keepdim=True).clamp(min=EPS)


def normalised(weights: Tensor, valid: Tensor, how: Norm) -> Tensor:
    """Return `weights` (G, M, N) with rows or columns of sum 1, a total of one per valid target, or as they are."""
    if how == "none":
        return weights
    if how == "global":
        total = weights.sum((1, 2), keepdim=True)
        return weights * valid.sum(1)[:, None, None] / (total + EPS)
    return weights / (weights.sum(-1 if how == "row" else -2, keepdim=True) + EPS)
