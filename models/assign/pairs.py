"""From padded tensors of slots and weights back to the flat pairs of an `Assignment`.

The number of pairs is known on the host: so many per target, or one per slot. Pairs of weight 0 fill up the rest; they
count nothing in any loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from models.assign.dense import PaddedTargets, Slots
from models.assign.hungarian import Request
from ops.transfer import send
from util.structures import Assignment


@dataclass
class Pairs:
    """Flat pairs, (P,) each, as `Assignment` has them."""

    layer: Tensor
    image: Tensor
    slot: Tensor
    target: Tensor
    weight: Tensor
    score: Tensor | None = None

    def __add__(self, other: Pairs) -> Pairs:
        values = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return Pairs(*(None if a is None else torch.cat([a, b]) for a, b in values))


def pairs_of_targets(
    request: Request, slots: Slots, targets: PaddedTargets, slot: Tensor, weight: Tensor, score: Tensor | None = None
) -> Pairs:
    """Return k pairs for every target of every layer.

    Args:
        slot, weight, score: (G, M, k).
    """
    group = _groups(slots.layers, len(targets.sizes), targets.image)
    own = slot[group, targets.row]  # (L, T, k)
    return Pairs(
        _layers(request, own),
        targets.image[None, :, None].expand_as(own).flatten(),
        slots.place(group[..., None], own).flatten(),
        targets.row[None, :, None].expand_as(own).flatten(),
        weight[group, targets.row].flatten(),
        None if score is None else score[group, targets.row].flatten(),
    )


def pairs_of_slots(
    request: Request, slots: Slots, targets: PaddedTargets, target: Tensor, weight: Tensor, score: Tensor | None = None
) -> Pairs:
    """Return one pair for every slot of every layer, in the images that have targets.

    Args:
        target, weight, score: (G, N).
    """
    device, images = target.device, [i for i, size in enumerate(targets.sizes) if size]
    known = torch.tensor([images, [targets.sizes[i] - 1 for i in images]], dtype=torch.int64)
    image, last = send(known, device)
    group = _groups(slots.layers, len(targets.sizes), image)
    own = target[group]  # (L, I, N)
    return Pairs(
        _layers(request, own),
        image[None, :, None].expand_as(own).flatten(),
        slots.place(group[..., None], torch.arange(target.shape[1], device=device).expand_as(own)).flatten(),
        torch.minimum(own, last[None, :, None]).flatten(),  # a slot of no target has weight 0 and any target
        weight[group].flatten(),
        None if score is None else score[group].flatten(),
    )


def _groups(layers: int, images: int, image: Tensor) -> Tensor:
    """Return the row of G, (L, I), of each layer and each of the I entries of `image`."""
    return torch.arange(layers, device=image.device)[:, None] * images + image


def _layers(request: Request, own: Tensor) -> Tensor:
    rows = send(torch.tensor(list(request.rows)), own.device)
    return rows[:, None, None].expand_as(own).flatten()


def by_block(request: Request) -> Iterator[Request]:
    """Yield the blocks of slots that `request` wants matched on their own; mostly it is one."""
    slots, width = request.slots, request.supervision.block
    if width is None:
        yield request
        return
    for start in range(slots.start, slots.stop, width):
        yield replace(request, slots=slice(start, min(start + width, slots.stop)))


def join_blocks(parts: list[Assignment]) -> Assignment:
    """Return the assignment of a request from those of its blocks: losses add up, log entries are averaged."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name in ("layer", "image", "slot", "target", "weight", "score"):
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else torch.cat(values)
    if parts[0].ignore is not None:
        joined["ignore"] = torch.cat([part.ignore for part in parts], 2)
    losses = {name: sum(part.losses[name] for part in parts) for name in parts[0].losses}
    logs = {name: sum(part.logs[name] for part in parts) / len(parts) for name in parts[0].logs}
    return Assignment(**joined, count=parts[0].count, losses=losses, logs=logs)
