"""Feature maps and objects of the cases that test one auxiliary head."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from models.aux_heads.base import Objects, Pyramid


def make_pyramid(meta: dict, width: int, strides: list[int]) -> Pyramid:
    """Return the drawn maps of a case, (B, width, h, w) per level."""
    sizes = [tuple(size) for size in meta["images"]]
    maps = []
    for level, shape in enumerate(meta["levels"]):
        values = np.random.RandomState(meta["feat_seed"] + level).randn(len(sizes), width, *shape)
        maps.append(torch.from_numpy(values.astype(np.float32)))
    return Pyramid(maps, tuple(strides), sizes, sizes, tuple(meta["batch_shape"]))


def make_objects(meta: dict) -> Objects:
    """Return the objects of a case."""
    counts = [len(t["labels"]) for t in meta["targets"]]
    return Objects(
        pad_sequence([torch.tensor(t["labels"]).long() for t in meta["targets"]], batch_first=True),
        pad_sequence([torch.tensor(t["boxes"]).view(-1, 4) for t in meta["targets"]], batch_first=True),
        torch.arange(max(counts)) < torch.tensor(counts)[:, None],
        counts,
    )
