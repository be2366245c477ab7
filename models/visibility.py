"""Which decoder queries see each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from util.structures import QueryGroup


def visibility(groups: Sequence[QueryGroup], device: torch.device) -> Tensor | None:
    """Return who may attend to whom, (sum Q, sum Q) bool, row = the looking query; None when all see all.

    A query sees its own block and every group that its group names in `sees`, never the reverse unless said there.
    """
    if len(groups) == 1 and groups[0].block is None:
        return None
    return _visibility(tuple((g.name, len(g), g.block, g.sees) for g in groups), device)


@lru_cache(maxsize=2)  # without groups made from targets the sizes are the same in every step, else each is another
def _visibility(groups: tuple[tuple[str, int, int | None, tuple[str, ...]], ...], device: torch.device) -> Tensor:
    group_of = torch.cat([torch.full((size,), i) for i, (_, size, _, _) in enumerate(groups)])
    block_of = torch.cat([torch.arange(size) // (block or max(size, 1)) for _, size, block, _ in groups])
    sees = torch.tensor([[other in seen for other, *_ in groups] for *_, seen in groups])
    # Only these short lists travel; the table of all pairs is made where it is used.
    group_of, block_of, sees = (values.to(device, non_blocking=True) for values in (group_of, block_of, sees))
    same = (group_of[:, None] == group_of[None]) & (block_of[:, None] == block_of[None])
    return same | sees[group_of[:, None], group_of[None]]


def hide_padding(blocked: Tensor | None, padding: Tensor | None, heads: int) -> Tensor | None:
    """Return `blocked` (Q, Q), True where a query (row) may not see another, with empty slots hidden from all others.

    An empty slot still sees itself: a row without anything to see would be NaN, and so would be all gradients.

    Args:
        padding: (B, Q), True = empty slot; None: there are none, and `blocked` is returned as it is.
        heads: of the attention, which wants the mask once for each.

    Returns:
        (B * heads, Q, Q) where there is padding.
    """
    if padding is None:
        return blocked
    itself = torch.eye(padding.shape[1], dtype=torch.bool, device=padding.device)
    hidden = padding[:, None] & ~itself
    hidden = hidden if blocked is None else hidden | blocked
    return hidden.repeat_interleave(heads, 0)
