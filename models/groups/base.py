"""Query groups: what a training scheme contributes to the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from models.heads import Heads
from util.structures import DetectorOutput, ImageBatch, Memory, QueryGroup, Seeds, Supervision, Target

# Two-stage: every target is class 0, "object", of the proposals.
ENCODER_SUPERVISION = (Supervision("proposals", class_agnostic=True),)


@dataclass
class Context:
    """What a group source may look at while it makes its queries."""

    images: ImageBatch
    memory: Memory
    seeds: Seeds  # the rows that belong to this source: `num_queries` of them, fewer if there are fewer tokens
    targets: list[Target] | None
    epoch: int
    output: DetectorOutput  # to add losses, log entries and detections of its own (`aux_*`)


class OwnParts(nn.Module):
    """Parts that the queries of a source do not share with the other queries; None = shared, as all of them mostly are.

    Args:
        encoder, decoder: modules in place of the transformer's.
        class_embed, bbox_embed: heads by decoder layer, in place of the detector's. With an own encoder entry
            `dec_layers` belongs to its proposals, as in the shared heads.
    """

    def __init__(
        self,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        class_embed: nn.ModuleList | None = None,
        bbox_embed: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.class_embed, self.bbox_embed = class_embed, bbox_embed

    def over(self, shared: Heads) -> Heads:
        """Return the heads of these queries: the own ones where there are some, else the `shared` ones."""
        if self.class_embed is None and self.bbox_embed is None:
            return shared
        return Heads(self.class_embed or shared.class_embed, self.bbox_embed or shared.bbox_embed)


class GroupSource(nn.Module):
    """Makes the queries of one scheme and says how they are taught. One file per scheme, next to this one."""

    name: str  # of its group, and of its parameters in the state dict: `groups.NAME.*`
    num_queries: int = 0  # how many ranked first queries it consumes
    training_only: bool = True  # silent in `eval()`: inference needs no switch
    proposal_supervision: tuple[Supervision, ...] = ENCODER_SUPERVISION  # how the proposals ranked for it are taught

    def __init__(self) -> None:
        super().__init__()
        # Modules of this source that published files hold at the top, by name there: the detector registers them.
        self.published: Mapping[str, nn.Module] = {}
        # Not class attributes: those would hide the modules that a source puts here.
        self.proposal_embed: nn.Linear | None = None  # class head that ranks the encoder proposals for this source only
        self.own = OwnParts()

    @property
    def alive(self) -> bool:
        """Whether it contributes in the present mode."""
        return self.training or not self.training_only

    def supervision(self, epoch: int) -> tuple[Supervision, ...]:
        """Return how its queries are taught in this epoch."""
        raise NotImplementedError

    def forward(self, ctx: Context) -> list[QueryGroup]:
        """Return the groups of this scheme for one batch."""
        raise NotImplementedError
