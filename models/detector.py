"""The detector: one forward pass that knows no training scheme."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from torch import Tensor, nn

from models.backbones import resize_padding
from models.groups.base import ENCODER_SUPERVISION, Context, GroupSource
from models.heads import Heads
from models.neck import InputProjection
from models.transformer import DeformableTransformer
from util.structures import (
    Claim,
    DetectorOutput,
    ImageBatch,
    Memory,
    Predictions,
    QueryGroup,
    Seeds,
    SupervisedSet,
    Target,
)


@dataclass
class _Decoding:
    """Groups that are decoded together."""

    decoder: nn.Module
    memory: Memory
    groups: list[QueryGroup] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)  # of each group

    def add(self, group: QueryGroup, heads: Heads) -> None:
        """Decode `group` too, with `heads`."""
        self.groups.append(group)
        self.heads.append(heads)


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
        num_rows = sum(source.num_queries for source in groups)
        self.transformer = transformer
        self.class_embed, self.bbox_embed = transformer.own_heads(heads)
        for name in second_names:
            self.transformer.decoder.add_module(name, getattr(self, name))
        tables = transformer.make_tables(num_rows)
        self.table_names = tuple(tables)
        for name, table in tables.items():
            self.add_module(name, table)
        for source in groups:
            for name, module in source.published.items():
                self.add_module(name, module)
        self.input_proj = neck
        self.backbone = backbone
        self.groups = nn.ModuleDict({source.name: source for source in groups})

    @property
    def heads(self) -> Heads:
        return self.transformer.all_heads(self.class_embed, self.bbox_embed)

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
        streams = self._streams(images)
        output = DetectorOutput({})
        decoded: dict[tuple[int, int, int], _Decoding] = {}
        for source, memory, seeds in streams:
            decoder, heads = source.own.decoder or self.transformer.decoder, source.own.over(self.heads)
            for group in source(Context(images, memory, seeds, targets, epoch, output)):
                # Points and boxes are refined in different ways.
                key = (id(decoder), id(memory), group.reference.shape[-1])
                decoded.setdefault(key, _Decoding(decoder, memory)).add(group, heads)
        for part in decoded.values():
            output.sets.update(part.decoder(part.groups, part.memory, part.heads))
        for source, _, seeds in streams:
            if seeds.encoder is not None:
                self._add_proposals(output.sets, source, seeds.encoder)
        return output

    def encode(self, images: ImageBatch) -> Memory:
        """Return the encoder's memory of `images`."""
        return self.transformer.encode(*self.project(images))

    def project(self, images: ImageBatch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the maps [(B, D, h, w)] of all levels, their position encodings and their paddings [(B, h, w)]."""
        features = self.backbone(images.normalized().pixels, images.padding)
        maps = self.input_proj([feature for feature, _ in features])
        paddings = [padding for _, padding in features]
        paddings += [resize_padding(images.padding, m.shape[-2:]) for m in maps[len(features) :]]
        position_encoding = self.backbone[1]
        return maps, [position_encoding(p) for p in paddings], paddings

    def claims(self) -> dict[str, Claim]:
        """Return what each source wants of the ranked queries; ranks do not depend on who is alive."""
        starts = accumulate((g.num_queries for g in self.groups.values()), initial=0)
        return {
            name: Claim(start, source.num_queries, source.proposal_embed)
            for (name, source), start in zip(self.groups.items(), starts)
        }

    def _streams(self, images: ImageBatch) -> list[tuple[GroupSource, Memory, Seeds]]:
        """Return every living source with the memory that it looks at and its first queries."""
        projected, claims = self.project(images), self.claims()
        by_encoder: dict[nn.Module | None, list[GroupSource]] = {}
        for source in self.groups.values():
            if source.alive:
                by_encoder.setdefault(source.own.encoder, []).append(source)
        tables = {name: getattr(self, name).weight for name in self.table_names}
        streams = []
        for encoder, sources in by_encoder.items():
            memory = self.transformer.encode(*projected, encoder)
            heads, wanted = self.heads, [claims[s.name] for s in sources]
            if encoder is not None:  # nobody else takes proposals of this memory
                heads, wanted = sources[0].own.over(self.heads), [replace(c, rank=0) for c in wanted]
            seeds = self.transformer.seeds(memory, heads, tables, wanted)
            streams += [(source, memory, found) for source, found in zip(sources, seeds)]
        return streams

    def _add_proposals(self, sets: dict[str, SupervisedSet], source: GroupSource, proposals: Predictions) -> None:
        """Add the set `encoder`, and one more for a source that ranks proposals itself or has an encoder of its own."""
        apart = source.proposal_embed is not None or source.own.encoder is not None
        taught = source.proposal_supervision if apart else ENCODER_SUPERVISION
        taught = tuple(replace(s, class_agnostic=self.transformer.class_agnostic) for s in taught)
        name = self.transformer.proposals_name
        if apart:
            sets[f"{name}_{source.name}"] = SupervisedSet(proposals, taught)
        else:
            sets.setdefault(name, SupervisedSet(proposals, taught))
