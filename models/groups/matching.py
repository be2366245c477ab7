"""One-to-one matching: the queries of inference, matched one-to-one on every layer (DETR)."""

from __future__ import annotations

from models.groups.base import Context, GroupSource
from util.structures import QueryGroup, Supervision


class OneToOne(GroupSource):
    """The group `one2one`; it takes the best-ranked queries and is the only one alive in inference."""

    name = "one2one"
    training_only = False

    def __init__(self, num_queries: int) -> None:
        super().__init__()
        self.num_queries = num_queries

    def supervision(self, epoch: int) -> tuple[Supervision, ...]:
        return (Supervision("queries"),)

    def forward(self, ctx: Context) -> list[QueryGroup]:
        seeds = ctx.seeds
        return [QueryGroup(self.name, seeds.content, seeds.reference, seeds.pos, self.supervision(ctx.epoch))]
