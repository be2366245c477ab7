"""Query groups: what a training scheme contributes to the decoder, and which queries see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from util.structures import ImageBatch, Memory, QueryGroup, Seeds, Target


@dataclass
class Context:
    """What a group source may look at while it makes its queries."""

    images: ImageBatch
    memory: Memory
    seeds: Seeds  # the rows that belong to this source: `num_queries` of them, fewer if there are fewer tokens
    targets: list[Target] | None
    epoch: int


class GroupSource(nn.Module):
    """Makes the queries of one scheme and says how they are taught. One file per scheme, next to this one."""

    num_queries: int = 0  # how many ranked first queries it consumes
    training_only: bool = True  # silent in `eval()`: inference needs no switch

    @property
    def alive(self) -> bool:
        """Whether it contributes in the present mode."""
        return self.training or not self.training_only

    def forward(self, ctx: Context) -> list[QueryGroup]:
        """Return the groups of this scheme for one batch."""
        raise NotImplementedError


def visibility(groups: Sequence[QueryGroup], device: torch.device) -> Tensor | None:
    """Return who may attend to whom, (sum Q, sum Q) bool, row = the looking query; None when all see all.

    A query sees its own block and every group that its group names in `sees`, never the reverse unless said there.
    """
    if len(groups) == 1 and groups[0].block is None:
        return None
    return _visibility(tuple((g.name, len(g), g.block, g.sees) for g in groups), device)


@lru_cache(maxsize=16)  # the groups of a run have few different sizes; built on the host, copied once
def _visibility(groups: tuple[tuple[str, int, int | None, tuple[str, ...]], ...], device: torch.device) -> Tensor:
    group_of = torch.cat([torch.full((size,), i) for i, (_, size, _, _) in enumerate(groups)])
    block_of = torch.cat([torch.arange(size) // (block or max(size, 1)) for _, size, block, _ in groups])
    same = (group_of[:, None] == group_of[None]) & (block_of[:, None] == block_of[None])
    sees = torch.tensor([[other in seen for other, *_ in groups] for *_, seen in groups])
    return (same | sees[group_of[:, None], group_of[None]]).to(device)
