"""Co-DETR, section 3: auxiliary heads on the encoder's maps, and decoder queries made from their positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from models.aux_heads.adapter import SingleScaleAdapter, block
from models.aux_heads.base import AuxHead, Objects, Pyramid
from models.groups.base import Context, GroupSource
from models.groups.positives import PositiveQueries
from util.structures import Detections, QueryGroup


class Collaborative(GroupSource):
    """Heads with one-to-many assigners teach the encoder; each has a group `co_HEAD` of decoder queries.

    The groups are as large as the images have positives, see nobody else, and are taught with the pairs of their head
    on every layer. None of it exists in inference, unless a head is evaluated.

    Args:
        heads: by name.
        queries: makes decoder queries of the samples of a head; None: the heads teach the encoder only.
        width: channels of the encoder's maps.
        strides: of the heads' pyramid, in pixels, finest first.
        adapter: makes all but the coarsest level from a single encoder map; None: they are the encoder's maps.
        loss_scale: factor of all losses of the heads: the number of decoder layers times lambda2 (eq. 6: the term of
            the heads is inside the sum over layers).
        evaluated: name of the head that detects in inference, "" = none.
    """

    name = "co"

    def __init__(
        self,
        heads: Mapping[str, AuxHead],
        queries: PositiveQueries | None,
        *,
        width: int,
        strides: Sequence[int],
        loss_scale: float,
        adapter: SingleScaleAdapter | None = None,
        evaluated: str = "",
    ) -> None:
        super().__init__()
        self.evaluated, self.training_only = evaluated, not evaluated
        self.strides = tuple(strides)
        self.loss_scale = loss_scale
        self.adapter = adapter
        self.downsample = block(width, stride=2)
        self.heads = nn.ModuleDict(heads)
        self.queries = queries

    def forward(self, ctx: Context) -> list[QueryGroup]:
        """Add the losses of the heads to the output and return their groups; in inference add detections, no group.

        Raises:
            ValueError: training without targets.
        """
        pyramid = self.pyramid(ctx)
        if not self.training:
            ctx.output.aux_detections[self.evaluated] = self.detect(pyramid)
            return []
        if ctx.targets is None:
            raise ValueError("auxiliary heads assign targets in training: call the detector with targets, or in eval()")
        objects = Objects.of(ctx.targets, pyramid.sizes)
        outputs = {name: head(pyramid, objects) for name, head in self.heads.items()}
        for name, output in outputs.items():
            for term, loss in output.losses.items():
                ctx.output.aux_losses[f"{term}_{name}"] = self.loss_scale * loss.sum()
            ctx.output.aux_logs.update((f"{key}_{name}", value) for key, value in output.logs.items())
        if self.queries is None:
            return []
        return self.queries({name: output.samples for name, output in outputs.items()}, pyramid.sizes)

    def pyramid(self, ctx: Context) -> Pyramid:
        """Return the encoder's maps and one more level (section 3.2, multi-scale adapter)."""
        maps = ctx.memory.maps()
        if self.adapter is not None:
            maps = self.adapter(*maps)
        maps.append(self.downsample(maps[-1]))
        sizes = list(ctx.images.sizes)
        return Pyramid(maps, self.strides, sizes, sizes, tuple(ctx.images.pixels.shape[-2:]))

    def detect(self, pyramid: Pyramid) -> list[Detections]:
        """Return what the evaluated head detects on its own, boxes xyxy relative to the image."""
        scales = [torch.tensor((w, h, w, h)) for h, w in pyramid.sizes]
        found = self.heads[self.evaluated].predict(pyramid)
        return [replace(d, boxes_px=d.boxes_px / s.to(d.boxes_px)) for d, s in zip(found, scales)]
