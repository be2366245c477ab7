"""H-DETR, section 3.2, hybrid branch: extra queries in training, matched one-to-many."""

from __future__ import annotations

from models.groups.base import Context, GroupSource
from util.structures import QueryGroup, Supervision


class OneToMany(GroupSource):
    """The group `one2many`: T queries of the next ranks, blind to the one-to-one queries and they to it.

    Args:
        num_queries: T, 1500 in the paper.
        repeat: K, how often a target may be matched, 6 in the paper.
        weight: lambda of the one-to-many losses.
    """

    def __init__(self, num_queries: int, *, repeat: int, weight: float) -> None:
        super().__init__()
        self.num_queries = num_queries
        self.supervision = Supervision("hungarian", repeat=repeat, weight=weight)

    def forward(self, ctx: Context) -> list[QueryGroup]:
        seeds = ctx.seeds
        return [QueryGroup("one2many", seeds.content, seeds.reference, seeds.pos, (self.supervision,))]
