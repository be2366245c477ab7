"""H-DETR, section 3.2: hybrid matching as a branch (more queries), by epoch or by decoder layer (the same queries).

The one-to-many branch is a group of its own and exists in training only. The other two forms teach the queries of
inference, so they change nothing but the supervision of the group `one2one`. In all three the encoder proposals are
matched one-to-one, once.
"""

from __future__ import annotations

from torch import nn

from models.groups.base import Context, GroupSource, OwnParts
from models.groups.matching import OneToOne
from util.structures import QueryGroup, Supervision


class OneToMany(GroupSource):
    """The group `one2many`: T queries of the next ranks, blind to the one-to-one queries and they to it.

    Args:
        num_queries: T, 1500 in the paper.
        repeat: K, how often a target may be matched, 6 in the paper.
        weight: lambda of the one-to-many losses.
        isolated: cut the queries into K groups of equal size, blind to each other, each matched one-to-one, and add
            their losses (H-TransTrack); otherwise all see each other and share K copies of every target.
        proposal_embed: class head that ranks the proposals the one-to-one queries leave, taught with K + 1 copies of
            every target, also times lambda (supplement); None: they are the next ones in the common ranking.
        own: parts that these queries do not share (supplement); None: they share all.

    Raises:
        ValueError: `num_queries` cannot be cut into `repeat` isolated groups.
    """

    name = "one2many"

    def __init__(
        self,
        num_queries: int,
        *,
        repeat: int,
        weight: float,
        isolated: bool = False,
        proposal_embed: nn.Linear | None = None,
        own: OwnParts | None = None,
    ) -> None:
        super().__init__()
        if isolated and num_queries % repeat:
            raise ValueError(f"{num_queries} queries cannot be cut into {repeat} groups of equal size")
        self.num_queries = num_queries
        copies = {"block": num_queries // repeat} if isolated else {"repeat": repeat}
        self.taught = Supervision("queries", weight=weight, **copies)
        self.own = own or OwnParts()
        self.proposal_embed = proposal_embed
        if proposal_embed is not None:
            taught = Supervision("proposals", weight=weight, repeat=repeat + 1, class_agnostic=True)
            self.proposal_supervision = (taught,)

    def supervision(self, epoch: int) -> tuple[Supervision, ...]:
        return (self.taught,)

    def forward(self, ctx: Context) -> list[QueryGroup]:
        seeds, taught = ctx.seeds, self.supervision(ctx.epoch)
        return [QueryGroup(self.name, seeds.content, seeds.reference, seeds.pos, taught, block=self.taught.block)]


class HybridEpoch(OneToOne):
    """One-to-many in the first epochs, one-to-one in the others, never both.

    Args:
        num_queries: M, 1800 in the paper, all of them also in inference.
        repeat: K, 10 in the paper.
        epochs: number of first epochs, 2/3 of all in the paper.
    """

    def __init__(self, num_queries: int, *, repeat: int, epochs: int) -> None:
        super().__init__(num_queries)
        self.repeat = repeat
        self.epochs = epochs

    def supervision(self, epoch: int) -> tuple[Supervision, ...]:
        # In evaluation always one-to-one, so that validation losses of all epochs compare.
        repeat = self.repeat if self.training and epoch < self.epochs else 1
        return (Supervision("queries", repeat=repeat),)


class HybridLayer(OneToOne):
    """One-to-many on the first decoder layers, one-to-one on the others.

    Args:
        num_queries: N, 1800 in the paper, all of them also in inference.
        repeat: K, 10 in the paper.
        first: L1, the number of first layers, 4 in the paper.
        layers: of the decoder, 6 in the paper.
    """

    def __init__(self, num_queries: int, *, repeat: int, first: int, layers: int) -> None:
        super().__init__(num_queries)
        parts = ((range(first), repeat), (range(first, layers), 1))
        self.taught = tuple(Supervision("queries", layers=part, repeat=k) for part, k in parts if len(part))

    def supervision(self, epoch: int) -> tuple[Supervision, ...]:
        return self.taught
