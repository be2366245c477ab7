"""What the decoder looks at: the sampling points of its last layer, and the attention that positives give to each cell.

Nothing in the detector knows that it is watched: forward hooks read what its parts get and return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from models.assign import Request
from models.criterion import Criterion
from models.decoder import DeformableDecoder
from models.detector import Detector
from ops import MSDeformAttn, sampling_points
from util.structures import Assignment, DetectorOutput, FlatTargets, LevelShapes, Memory, SupervisedSet, Target


@dataclass
class Samples:
    """Where Q queries look in one deformable attention."""

    locations: Tensor  # (B, Q, heads, levels, points, 2) as (x, y) in 0..1 of each level's map, padding included
    weights: Tensor  # (B, Q, heads, levels, points), sum 1 for each query and head

    def of(self, slots: slice) -> Samples:
        """Return those of some queries."""
        return Samples(self.locations[:, slots], self.weights[:, slots])


@dataclass
class Seen:
    """What was seen of one forward pass."""

    memory: Memory | None = None  # of the encoder that inference uses
    samples: dict[str, Samples] = field(default_factory=dict)  # of the last decoder layer, by set


@contextmanager
def watch(model: Detector) -> Iterator[Seen]:
    """Watch one forward pass: encoder and all decoders, also those that belong to one group only (`OwnParts`)."""
    seen, attended = Seen(), {}

    def remember_memory(module, inputs, memory: Memory) -> None:
        seen.memory = memory

    def remember_attention(attention: MSDeformAttn, inputs: tuple, output) -> None:
        attended[attention] = sampling(attention, *inputs[:2], level_shapes=inputs[3])

    def cut(decoder: DeformableDecoder, inputs, sets: dict[str, SupervisedSet]) -> None:
        whole = attended.pop(decoder.layers[-1].cross_attn)
        for name, own in sets.items():
            seen.samples[name] = whole.of(slice(own.start, own.start + own.predictions.logits.shape[2]))

    handles = [model.transformer.encoder.register_forward_hook(remember_memory)]
    for decoder in [module for module in model.modules() if isinstance(module, DeformableDecoder)]:
        handles.append(decoder.layers[-1].cross_attn.register_forward_hook(remember_attention))
        handles.append(decoder.register_forward_hook(cut))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def sampling(
    attention: MSDeformAttn, query: Tensor, reference: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> Samples:
    """Return the sampling points of `attention` for the arguments of its forward pass."""
    shape = (*query.shape[:2], attention.n_heads, attention.n_levels, attention.n_points)
    offsets = attention.sampling_offsets(query).view(*shape, 2)
    logits = attention.attention_weights(query).view(shape)
    return Samples(*sampling_points(reference, offsets, logits, level_shapes))


def splat(samples: Samples, chosen: Tensor, shapes: LevelShapes) -> list[Tensor]:
    """Return the attention that the chosen queries give to every cell, [(B, h, w)] per level, summed over heads.

    The weight of a point goes to the four cells around it in the shares with which the attention reads them; the
    centre of cell (0, 0) is at (0.5 / w, 0.5 / h). Shares outside the map are lost, as zeros are read there.

    Args:
        samples: of Q queries.
        chosen: (B, Q) bool.
    """
    weights = samples.weights * chosen[:, :, None, None, None]
    maps = []
    for level, (height, width) in enumerate(shapes):
        x, y = (samples.locations[..., level, :, :] * samples.locations.new_tensor((width, height)) - 0.5).unbind(-1)
        own = x.new_zeros(len(x), height * width)
        for right, below in product((0, 1), repeat=2):
            column, row = x.floor() + right, y.floor() + below
            share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * weights[..., level, :]
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = torch.where(inside, row * width + column, 0).long()
            own.scatter_add_(1, cell.flatten(1), torch.where(inside, share, 0).flatten(1))
        maps.append(own.unflatten(1, (height, width)))
    return maps


def positives(name: str, supervised: SupervisedSet, criterion: Criterion, targets: Sequence[Target]) -> Tensor:
    """Return which queries of a set are matched with an object on the last layer, (B, Q) bool.

    Pairs are those of training: ready-made ones, or of the assigner of `criterion` that the supervision asks, at the
    end of its schedule. Pairs of weight 0 are none, and supervisions that do not teach the last layer give none.
    """
    predictions, last = supervised.predictions, supervised.predictions.layers - 1
    found = torch.zeros(predictions.logits.shape[1:3], dtype=torch.bool, device=predictions.logits.device)
    for supervision in supervised.supervision:
        layers = range(last + 1) if supervision.layers is None else supervision.layers
        if last not in layers:
            continue
        pairs = supervision.assign
        if isinstance(pairs, Assignment):
            real = pairs.layer == layers.index(last)
        else:
            flat = FlatTargets.of(targets)
            if supervision.class_agnostic:
                flat = replace(flat, labels=torch.zeros_like(flat.labels))
            request = Request(name, predictions.select_layers([last]), flat, supervision, layers=[last])
            (pairs,) = criterion.assigners[supervision.assign]([request])
            real = torch.ones_like(pairs.slot, dtype=torch.bool)
        if pairs.weight is not None:
            real &= pairs.weight > 0
        found[pairs.image[real], pairs.slot[real]] = True
    return found


def attention_of_positives(
    output: DetectorOutput, seen: Seen, criterion: Criterion, targets: Sequence[Target]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the attention of all positives together, [(B, h, w)] per level, and which queries they are, by set.

    Sets count that the decoder made and that training supervises; a query that several supervisions match counts once.
    """
    chosen = {name: positives(name, output.sets[name], criterion, targets) for name in seen.samples}
    maps = [splat(seen.samples[name], found, seen.memory.shapes) for name, found in chosen.items()]
    return [torch.stack(level).sum(0) for level in zip(*maps)], chosen
