"""The detector: one forward pass that knows no training scheme."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.backbones import resize_padding
from models.groups.base import Context, GroupSource
from models.heads import Heads
from models.neck import InputProjection
from models.transformer import DeformableTransformer
from util.structures import (
    DetectorOutput,
    ImageBatch,
    Memory,
    QueryGroup,
    Seeds,
    SupervisedSet,
    Supervision,
    Target,
)

ENCODER_SUPERVISION = (Supervision("hungarian", class_agnostic=True),)


class Detector(nn.Module):
    """Backbone, neck, deformable transformer, heads; the training schemes come in as `groups`.

    The names and the order of the parts are those of published checkpoints: names are part of the command line
    (`--lr_backbone_names`), the order matters for optimiser states, which are stored by position.

    Args:
        second_names: parts of `heads` that published checkpoints hold a second time inside the decoder.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module,
        neck: InputProjection,
        transformer: DeformableTransformer,
        heads: Heads,
        groups: Sequence[GroupSource],
        second_names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        num_rows = sum(g.num_queries for g in groups)
        self.transformer = transformer
        for name in second_names:
            self.transformer.decoder.add_module(name, getattr(heads, name))
        self.class_embed = heads.class_embed
        self.bbox_embed = heads.bbox_embed
        if transformer.query_width:
            self.query_embed = nn.Embedding(num_rows, transformer.query_width)
        self.input_proj = neck
        self.backbone = backbone
        self.groups = nn.ModuleList(groups)

    @property
    def heads(self) -> Heads:
        return Heads(self.class_embed, self.bbox_embed)

    def forward(self, images: ImageBatch, targets: list[Target] | None = None, epoch: int = 0) -> DetectorOutput:
        """Detect.

        Args:
            images: B images.
            targets: their objects; training schemes that make queries from them need it, inference does not.
            epoch: number of the epoch, from 0; some schemes change with it.

        Returns:
            Predictions and supervision of every set: `one2one` always, `encoder` in two-stage, the sets of the training
            schemes in training mode only.
        """
        memory = self.encode(images)
        alive = [(source, start) for source, start in self._ranks() if source.alive]
        count = max(start + source.num_queries for source, start in alive)
        seeds = self.transformer.seeds(memory, self.heads, self._query_table(), count)
        groups = self._make_groups(alive, images, memory, seeds, targets, epoch)
        decoded = self.transformer.decoder(groups, memory, self.heads)
        sets = {g.name: SupervisedSet(decoded[g.name], g.supervision) for g in groups}
        if seeds.encoder is not None:
            sets["encoder"] = SupervisedSet(seeds.encoder, ENCODER_SUPERVISION)
        return DetectorOutput(sets)

    def encode(self, images: ImageBatch) -> Memory:
        """Return the encoder's memory of `images`."""
        features = self.backbone(images.pixels, images.padding)
        maps = self.input_proj([feature for feature, _ in features])
        paddings = [padding for _, padding in features]
        paddings += [resize_padding(images.padding, m.shape[-2:]) for m in maps[len(features) :]]
        position_encoding = self.backbone[1]
        return self.transformer.encode(maps, [position_encoding(p) for p in paddings], paddings)

    def _query_table(self) -> Tensor | None:
        return self.query_embed.weight if self.transformer.query_width else None

    def _ranks(self) -> list[tuple[GroupSource, int]]:
        """Return each source and the first rank that belongs to it."""
        starts = torch.tensor([0, *(g.num_queries for g in self.groups)]).cumsum(0).tolist()
        return list(zip(self.groups, starts))

    @staticmethod
    def _make_groups(
        alive: list[tuple[GroupSource, int]],
        images: ImageBatch,
        memory: Memory,
        seeds: Seeds,
        targets: list[Target] | None,
        epoch: int,
    ) -> list[QueryGroup]:
        groups = []
        for source, start in alive:
            rows = seeds.rows(start, source.num_queries)
            groups += source(Context(images, memory, rows, targets, epoch))
        return groups
