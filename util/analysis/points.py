"""Where queries and encoder tokens look, in pixels of a picture: the numbers behind `--analyse attention`.

Pixels are counted so that the picture spans 0 to its width and 0 to its height; the centre of its first pixel is at
(0.5, 0.5). The detector takes the cells of a level that are not padding for the whole image, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.detector import Detector
from ops.module import MSDeformAttn
from util.analysis.attention import sampling
from util.analysis.maps import valid_sizes
from util.boxes import cxcywh_to_xyxy
from util.structures import DetectorOutput, Memory


@dataclass(frozen=True)
class AttentionOptions:
    """What is drawn."""

    best: int = 3  # so many queries with the best scores
    queries: tuple[int, ...] = ()  # these queries instead
    layers: tuple[int, ...] = ()  # from 1; none: all
    points: tuple[tuple[float, float], ...] = ()  # (x, y) in pixels of the image: encoder tokens
    images: int = 4  # first ones with objects
    image_ids: tuple[int, ...] = ()  # these instead


@dataclass
class Look:
    """Where one query looks in one layer, in pixels of the picture."""

    layer: int  # from 1
    locations: np.ndarray  # (heads, levels, points, 2) as (x, y); may lie outside the picture, where zeros are read
    weights: np.ndarray  # (heads, levels, points), sum 1 for each head
    reference: np.ndarray  # (2,) point, or (4,) box cxcywh, that the sampling starts from
    box: np.ndarray | None = None  # (4,) xyxy, predicted by this layer; None: of an encoder token
    score: float = 0.0  # the largest one of this layer
    label: int = -1  # its class


@dataclass
class _Call:
    """One deformable attention and what it was called with."""

    attention: MSDeformAttn
    query: Tensor
    reference: Tensor  # (B, Q, levels, 2 or 4) in 0..1 of each padded level
    shapes: Sequence[tuple[int, int]]

    @torch.no_grad()
    def of(self, image: int, slots: Sequence[int], memory: Memory, size: tuple[float, float]) -> list[dict]:
        """Return locations, weights and reference of some queries of an image, as `Look` has them.

        Args:
            size: (h, w) of the picture.
        """
        index = torch.tensor(slots, device=self.query.device)
        query, reference = self.query[image : image + 1, index], self.reference[image : image + 1, index].float()
        samples = sampling(self.attention, query, reference, self.shapes)
        scale = reference.new_tensor((size[1], size[0]))
        ratios = memory.valid_ratios[image].to(reference)  # (levels, 2)
        locations = samples.locations[0] / ratios[:, None] * scale
        start = reference[0, :, 0] / ratios[0].repeat(reference.shape[-1] // 2) * scale.repeat(reference.shape[-1] // 2)
        parts = (locations, samples.weights[0], start)
        rows = zip(*(part.cpu().numpy() for part in parts))
        return [dict(zip(("locations", "weights", "reference"), row)) for row in rows]


@dataclass
class Watched:
    """What was seen of one forward pass in `eval()`."""

    memory: Memory | None = None
    encoder: list[_Call] = field(default_factory=list)  # by layer
    decoder: list[_Call] = field(default_factory=list)

    @torch.no_grad()
    def queries(
        self,
        output: DetectorOutput,
        image: int,
        queries: Sequence[int],
        layers: Sequence[int],
        size: tuple[float, float],
    ) -> list[list[Look]]:
        """Return where queries of inference look, `[query][layer]`.

        Args:
            output: of the same forward pass.
            image: index in the batch.
            queries: their numbers.
            layers: of the decoder, from 1.
            size: (h, w) of the picture in pixels.
        """
        supervised = output.sets["one2one"]
        slots = [supervised.start + query for query in queries]
        scale = torch.tensor((size[1], size[0]) * 2)
        columns = []
        for layer in layers:
            found = supervised.predictions.select_layers([layer - 1])
            scores, labels = found.logits[0, image].detach().float().sigmoid().cpu().max(-1)
            boxes = (cxcywh_to_xyxy(found.boxes[0, image].detach().float().cpu()) * scale).numpy()
            own = self.decoder[layer - 1].of(image, slots, self.memory, size)
            said = [(boxes[q], float(scores[q]), int(labels[q])) for q in queries]
            columns.append([Look(layer, **look, box=b, score=s, label=c) for look, (b, s, c) in zip(own, said)])
        return [list(row) for row in zip(*columns)]

    def tokens(
        self, image: int, point: tuple[float, float], layers: Sequence[int], size: tuple[float, float]
    ) -> list[list[Look]]:
        """Return where the encoder tokens at a point look, `[level][layer]`.

        Args:
            point: (x, y) in pixels of the picture, inside it; each level has one cell there.
            image, layers, size: as in `queries`, layers of the encoder.
        """
        slots = tokens_at(self.memory, image, (point[0] / size[1], point[1] / size[0]))
        columns = [
            [Look(layer, **look) for look in self.encoder[layer - 1].of(image, slots, self.memory, size)]
            for layer in layers
        ]
        return [list(row) for row in zip(*columns)]


@contextmanager
def watch_points(model: Detector) -> Iterator[Watched]:
    """Watch one forward pass of a model in `eval()`, where the queries of inference are the only ones."""
    seen = Watched()

    def remember_memory(module, inputs, memory: Memory) -> None:
        seen.memory = memory

    def remember(calls: list[_Call]):
        def hook(attention: MSDeformAttn, inputs: tuple, output) -> None:
            calls.append(_Call(attention, inputs[0], inputs[1], inputs[3]))

        return hook

    transformer = model.transformer
    handles = [transformer.encoder.register_forward_hook(remember_memory)]
    handles += [layer.self_attn.register_forward_hook(remember(seen.encoder)) for layer in transformer.encoder.layers]
    handles += [layer.cross_attn.register_forward_hook(remember(seen.decoder)) for layer in transformer.decoder.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tokens_at(memory: Memory, image: int, point: tuple[float, float]) -> list[int]:
    """Return the token of every level whose cell holds a point of an image.

    Args:
        point: (x, y) relative to the unpadded image; what lies outside belongs to the nearest cell.
    """
    slots, start = [], 0
    for (height, width), (rows, columns) in zip(memory.shapes, valid_sizes(memory)[image]):
        column = min(max(int(point[0] * columns), 0), columns - 1)
        row = min(max(int(point[1] * rows), 0), rows - 1)
        slots.append(start + row * width + column)
        start += height * width
    return slots


def best_queries(output: DetectorOutput, image: int, count: int) -> list[int]:
    """Return the queries with the best scores of any class on the last layer, best first."""
    scores = output.pred_logits[image].float().amax(-1)
    return scores.topk(min(count, len(scores))).indices.tolist()
