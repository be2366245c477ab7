"""Co-DETR, section 3.3: the positive boxes of an auxiliary head become decoder queries with ready-made pairs.

`choose_all` takes the boxes of all heads of a step, `PositiveQueries` embeds them, `pairs` says what they are taught.
The number of queries depends on the data: one wait for the device tells it for all heads; nothing else here waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import box_convert

from models.aux_heads import sampling
from models.aux_heads.base import Samples
from models.position_encoding import sine_embed_boxes
from ops.transfer import send
from util.structures import Assignment, QueryGroup, Supervision

Fill = Literal["negatives", "masked"]
PUBLISHED_ROWS = 2  # of the table of head embeddings, also with one head
BORDER = 1e-5  # the embedding, unlike the reference, sees coordinates this far from 0 and 1


@dataclass
class Chosen:
    """The n boxes of each image that become queries of one head, the positives first."""

    boxes: Tensor  # (B, n, 4) xyxy in pixels of the input, no gradient
    positive: Tensor  # (B, n) bool
    target: Tensor  # (B, n) int64, index of the object of a positive
    features: Tensor  # (B, n, D), with gradient
    counts: list[int]  # number of positives of each image, known on the host
    padding: Tensor | None = None  # (B, n) True = empty slot
    taught: bool = True  # False: nothing is learned from these queries

    def __len__(self) -> int:
        return self.boxes.shape[1]


def choose(samples: Samples, *, limit: int = 300, least: int = 9, fill: Fill = "negatives") -> Chosen:
    """Choose the queries of a single head; see `choose_all`."""
    return choose_all([samples], limit=limit, least=least, fill=fill)[0]


def choose_all(
    samples: Sequence[Samples], *, limit: int = 300, least: int = 9, fill: Fill = "negatives"
) -> list[Chosen]:
    """Choose the boxes of each head that become queries (published code; the paper is silent about the numbers).

    Every image of the batch gets n of them: as many as the image with most positives has, at most `limit`, but in any
    case `least`. Positives keep their order; where there are more than n, a random subset in random order is taken.

    Waits once for the device, whatever the number of heads.

    Args:
        samples: of each head, for the same B images.
        limit: largest number of positives of an image.
        least: smallest n, also where it is above `limit`.
        fill: what fills up images with fewer positives: random `negatives`, taught as background, or empty slots
            (`masked`). If some image has too few negatives, nothing is learned from the queries of that head.
    """
    if not samples:
        return []
    counts = torch.stack([torch.stack([s.positive.sum(1), s.negative.sum(1)]) for s in samples])
    return [_choose(s, *count, limit, least, fill) for s, count in zip(samples, counts.tolist())]


def _choose(samples: Samples, positives: list[int], negatives: list[int], limit: int, least: int, fill: Fill) -> Chosen:
    """Do the same for one head with so many `positives` and `negatives` in each image."""
    n = max(least, min(limit, max(positives)))
    counts = [min(count, n) for count in positives]
    samples = _with_at_least(samples, n)
    index, positive = _order(samples, n)
    row = index if samples.feature_of is None else samples.feature_of[index]
    chosen = Chosen(
        boxes=samples.boxes.detach().gather(1, index[..., None].expand(-1, -1, 4)),
        positive=positive,
        target=samples.target.gather(1, index),
        features=samples.features.gather(1, row[..., None].expand(-1, -1, samples.features.shape[-1])),
        counts=counts,
        taught=fill == "masked" or all(p + q >= n for p, q in zip(counts, negatives)),
    )
    if fill == "masked":
        chosen.padding = ~positive
        chosen.boxes = chosen.boxes.masked_fill(chosen.padding[..., None], 0.0)
        chosen.features = chosen.features.masked_fill(chosen.padding[..., None], 0.0)
    return chosen


def _order(samples: Samples, n: int) -> tuple[Tensor, Tensor]:
    """Return which boxes are chosen, (B, n): positives, then negatives; and which of them are positives.

    Where there are too few negatives the last ones are any boxes.
    """
    batch, count = samples.positive.shape
    keys = sampling.random_keys((batch, count), samples.boxes.device)
    slot = torch.arange(n, device=keys.device)
    positives = samples.positive.sum(1, keepdim=True)
    keys_of_positives = torch.where(positives > n, keys, torch.arange(count, dtype=keys.dtype, device=keys.device))
    first = keys_of_positives.masked_fill(~samples.positive, torch.inf).topk(n, largest=False).indices
    second = keys.masked_fill(~samples.negative, torch.inf).topk(n, largest=False).indices
    index = torch.where(slot < positives, first, second.gather(1, (slot - positives).clamp(min=0)))
    return index, slot < positives


def _with_at_least(samples: Samples, n: int) -> Samples:
    """Return `samples` with zero rows, neither positive nor negative, added until each image has `n` boxes."""
    missing = n - samples.boxes.shape[1]
    if missing <= 0:
        return samples
    return Samples(
        boxes=pad(samples.boxes, (0, 0, 0, missing)),
        positive=pad(samples.positive, (0, missing)),
        negative=pad(samples.negative, (0, missing)),
        target=pad(samples.target, (0, missing)),
        features=pad(samples.features, (0, 0, 0, missing)),
        feature_of=None if samples.feature_of is None else pad(samples.feature_of, (0, missing)),
    )


def pairs(chosen: Chosen, layers: int) -> Assignment:
    """Return the ready-made pairs of `chosen` on each of `layers` decoder layers: a positive with its object.

    All other slots are background, unless they are empty or nothing is to be learned. Losses are divided by the number
    of positives.
    """
    device = chosen.boxes.device
    counts = chosen.counts if chosen.taught else []
    image = [i for i, count in enumerate(counts) for _ in range(count)]
    slot = [s for count in counts for s in range(count)]
    image_slot = send(torch.tensor([image, slot], dtype=torch.int64), device)
    ignore = None
    if not chosen.taught:
        ignore = torch.ones(layers, *chosen.positive.shape, dtype=torch.bool, device=device)
    return Assignment(
        layer=torch.arange(layers, device=device).repeat_interleave(len(image)),
        image=image_slot[0].repeat(layers),
        slot=image_slot[1].repeat(layers),
        target=chosen.target[image_slot[0], image_slot[1]].repeat(layers),
        ignore=ignore,
        count=float(len(image)),
    )


class PositiveQueries(nn.Module):
    """Makes the decoder queries of all auxiliary heads, each with its own parameters, called by the head's name.

    Args:
        width: D.
        heads: names of the auxiliary heads.
        layers: number of decoder layers.
        weight: lambda1, of the losses of these queries.
        limit, least, fill: see `choose_all`.
        full_embed: each head has D numbers that are added to the position of its queries; False: a single number, as
            in the published code.
        boxes: the decoder makes the position of a query of its box (Co-DINO). Content is the embedding of the box alone
            then: no position, no feature, no number of the head.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: Sequence[str],
        layers: int,
        weight: float = 1.0,
        limit: int = 300,
        least: int = 9,
        fill: Fill = "negatives",
        full_embed: bool = False,
        boxes: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.layers, self.weight = width, layers, weight
        self.limit, self.least, self.fill, self.boxes = limit, least, fill, boxes
        made = width if boxes else 2 * width
        self.aux_pos_trans = _linear(heads, 2 * width, made)
        self.aux_pos_trans_norm = nn.ModuleDict({name: nn.LayerNorm(made) for name in heads})
        if boxes:
            return
        self.pos_feats_trans = _linear(heads, width, width)
        self.pos_feats_norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in heads})
        numbers = width if full_embed else 1
        table = torch.empty(max(len(heads), PUBLISHED_ROWS), numbers)  # its rows decide how large the values are
        nn.init.xavier_uniform_(table)
        self.head_pos_embed = nn.ParameterDict({name: row.clone() for name, row in zip(heads, table)})

    def forward(self, samples: Mapping[str, Samples], sizes: Sequence[tuple[int, int]]) -> list[QueryGroup]:
        """Return one group `co_HEAD` for each head, to be decoded on its own.

        Args:
            samples: boxes of each head by its name.
            sizes: (h, w) of each image in pixels.
        """
        chosen = choose_all(list(samples.values()), limit=self.limit, least=self.least, fill=self.fill)
        groups = []
        for head, own in zip(samples, chosen):
            content, pos, reference = self.embed(head, own, sizes)
            taught = (Supervision(pairs(own, self.layers), weight=self.weight),)
            groups.append(QueryGroup(f"co_{head}", content, reference, pos, taught, padding=own.padding))
        return groups

    def embed(
        self, head: str, chosen: Chosen, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return content (B, n, D), position (B, n, D) and reference (B, n, 4) of the queries of the head `head`.

        The reference is cxcywh relative to the image and not clamped: boxes may reach beyond its border. There is no
        position where the decoder makes it.
        """
        scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=chosen.boxes.dtype)
        relative = chosen.boxes / send(scale, chosen.boxes.device)[:, None]
        reference = box_convert(relative, "xyxy", "cxcywh")
        embedded = sine_embed_boxes(reference.clamp(BORDER, 1 - BORDER), self.width // 2)
        embedded = self.aux_pos_trans_norm[head](self.aux_pos_trans[head](embedded))
        if self.boxes:
            return embedded, None, reference
        pos, content = embedded.split(self.width, dim=-1)
        content = content + self.pos_feats_norm[head](self.pos_feats_trans[head](chosen.features))
        return content, pos + self.head_pos_embed[head], reference


def _linear(heads: Sequence[str], inputs: int, outputs: int) -> nn.ModuleDict:
    """Return a linear layer for each head with its first values: biases keep PyTorch's default, as published."""
    layers = nn.ModuleDict({name: nn.Linear(inputs, outputs) for name in heads})
    for layer in layers.values():
        nn.init.xavier_uniform_(layer.weight)
    return layers
