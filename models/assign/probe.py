"""The probe of match-free supervision: encoded objects ask the decoder's queries ("Beyond Hungarian", GT-Probe).

Exists in training only: its parameters belong to the criterion, not to the detector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from models.position_encoding import sine_embed_boxes

BoxCode = Literal["sine", "raw"]
ProbeLogits = Literal["cosine", "dot"]

# The sine code has wavelengths from the whole image down to 1/64 of it. Longer ones, as in position encodings, could
# not tell apart neighbours a few per cent away any better than the raw numbers.
FREQUENCIES, SHORTEST_WAVE = 64, 1 / 64
SCALE = 10.0  # first scale of cosine logits


class Probe(nn.Module):
    """How much every object and every query have to do with each other, (G, M, N) logits.

    Objects (class and box) and queries go through two-layer perceptrons into a common space.

    Args:
        width: D, of queries and perceptrons.
        num_classes: rows of the class code.
        logits: `cosine` times a learned scale, which cannot saturate; or `dot` products divided by sqrt(D).
        scale_max: largest scale of cosine logits.
        box_code: `sine` waves and the raw numbers, or the `raw` numbers of cxcywh.
        key_box: a query is known by its predicted box too, not only by its embedding.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        *,
        logits: ProbeLogits = "cosine",
        scale_max: float = 30.0,
        box_code: BoxCode = "sine",
        key_box: bool = True,
    ) -> None:
        super().__init__()
        self.box_code, self.key_box, self.scale_max = box_code, key_box, scale_max
        code = 4 + 8 * FREQUENCIES * (box_code == "sine")
        # A linear layer over one-hot class and box code, in two parts: the first is a table.
        self.target_class = nn.Embedding(num_classes, width)
        self.target_box = nn.Linear(code, width)
        for weight in (self.target_class.weight, self.target_box.weight):
            nn.init.uniform_(weight, -1 / math.sqrt(num_classes + code), 1 / math.sqrt(num_classes + code))
        self.target_out = nn.Linear(width, width)
        self.query_in = nn.Linear(width + code * key_box, width)
        self.query_out = nn.Linear(width, width)
        self.project_target = nn.Linear(width, width, bias=False)
        self.project_query = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE))) if logits == "cosine" else None

    def forward(
        self,
        embeds: Tensor,
        query_boxes: Tensor,
        labels: Tensor,
        boxes: Tensor,
        *,
        class_agnostic: bool = False,
        layers: Sequence[int | str] = (),
    ) -> Tensor:
        """Return the logits (G, M, N) of targets and queries, in float32; G is layers times images, layer by layer.

        Args:
            embeds: (G, N, D) of the queries.
            query_boxes: (G, N, 4) predicted cxcywh; no gradient goes there.
            labels: (B, M) of the targets of the images.
            boxes: (B, M, 4) cxcywh of the targets.
            class_agnostic: the class says nothing.
            layers: numbers of the layers that G goes through; this probe treats all alike.
        """
        with torch.autocast(embeds.device.type, enabled=False):
            classes = self.target_class(labels) * (not class_agnostic)  # times 0: the table still has a gradient
            target = (classes + self.target_box(self._code(boxes))).relu()
            target = _chained(target, self.target_out, self.project_target)
            query = self._query_in(embeds.float(), query_boxes.detach()).relu()
            query = _chained(query, self.query_out, self.project_query)
            if self.log_scale is not None:
                target, query = normalize(target, dim=-1), normalize(query, dim=-1)
            logits = target.repeat(len(query) // len(target), 1, 1) @ query.mT
            return logits / math.sqrt(target.shape[-1]) if self.log_scale is None else self._scale() * logits

    def _query_in(self, embeds: Tensor, boxes: Tensor) -> Tensor:
        """Return the first layer over embeddings and box codes, which are not put side by side: it is much slower."""
        if not self.key_box:
            return self.query_in(embeds)
        own, code = self.query_in.weight.split([embeds.shape[-1], self.query_in.in_features - embeds.shape[-1]], 1)
        return linear(embeds, own) + linear(self._code(boxes), code, self.query_in.bias)

    def _code(self, boxes: Tensor) -> Tensor:
        boxes = boxes.float()
        if self.box_code == "raw":
            return boxes
        return torch.cat([boxes, sine_embed_boxes(boxes, 2 * FREQUENCIES, temperature=SHORTEST_WAVE)], -1)

    def _scale(self) -> Tensor:
        if not self.training:
            return self.log_scale.exp().clamp(max=self.scale_max)
        with torch.no_grad():  # the parameter itself: at a bound of the value it would have no gradient to come back
            self.log_scale.clamp_(max=math.log(self.scale_max))
        return self.log_scale.exp()


def _chained(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Return second(first(x)): with nothing between them, one product for all rows of `x` in place of two."""
    return linear(x, second.weight @ first.weight, second.weight @ first.bias)


class LayerwiseProbe(nn.Module):
    """A probe for every supervised layer, and one for the proposals of the encoder, in place of one for all.

    Args:
        make: returns a new probe.
        layers: numbers of the decoder layers.
        proposals: the encoder has one too.
    """

    def __init__(self, make: Callable[[], Probe], layers: Sequence[int], *, proposals: bool = False) -> None:
        super().__init__()
        names = [*map(str, layers), *(["encoder"] if proposals else [])]
        self.probes = nn.ModuleDict({name: make() for name in names})

    def forward(
        self,
        embeds: Tensor,
        query_boxes: Tensor,
        labels: Tensor,
        boxes: Tensor,
        *,
        class_agnostic: bool = False,
        layers: Sequence[int | str],
    ) -> Tensor:
        """Return the logits (G, M, N) as `Probe` does, in a loop over the few layers.

        Args:
            layers: numbers of the decoder layers that G goes through, image by image; "encoder" for proposals.
        """
        names = list(map(str, layers))
        parts = zip(names, embeds.chunk(len(names)), query_boxes.chunk(len(names)))
        logits = torch.cat(
            [self.probes[name](*own, labels, boxes, class_agnostic=class_agnostic) for name, *own in parts]
        )
        # Probes that nobody asks in this step get a gradient of 0: several processes wait for all gradients.
        idle = [p.sum() for name, probe in self.probes.items() if name not in names for p in probe.parameters()]
        return logits + 0.0 * sum(idle)
