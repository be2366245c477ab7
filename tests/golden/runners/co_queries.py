"""Auxiliary queries of Co-DETR: which boxes become queries, where they are, and what they are taught."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from models.aux_heads import sampling
from models.aux_heads.base import Samples
from models.groups.positives import PositiveQueries, choose, pairs
from tests.golden.runners.common import assert_close
from util.structures import FlatTargets, Target

WIDTH, LAYERS = 256, 2
STORED = 4000  # subsample_rule of the cases


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    stored = {key: torch.from_numpy(value) for key, value in arrays.items()}
    background, sizes = meta["num_classes"], [tuple(size) for size in meta["images"]]
    samples, targets = _samples(meta, stored), _targets(stored, background, sizes)
    with patch.object(sampling, "random_keys", keys_in_order):
        chosen = choose(samples, limit=meta["max_pos_coords"])
    _, _, reference = PositiveQueries(WIDTH, heads=["head"], layers=LAYERS).embed("head", chosen, sizes)
    assignment = pairs(chosen, LAYERS)
    flat = FlatTargets.of(targets)
    for layer in range(LAYERS):
        here = assignment.layer == layer
        image, slot, target = (part[here] for part in (assignment.image, assignment.slot, assignment.target))
        index = flat.starts[image] + target
        labels = torch.full(stored["labels"].shape, background)
        boxes, box_weights = torch.zeros_like(stored["targets"]), torch.zeros_like(stored["box_weights"])
        labels[image, slot], boxes[image, slot], box_weights[image, slot] = flat.labels[index], flat.boxes[index], 1.0
        assert labels.tolist() == stored["labels"].tolist(), "labels of the queries"
        assert_close("target boxes", boxes, arrays["targets"], 1e-6)
        assert_close("weights of the boxes", box_weights, arrays["box_weights"], 0)
    assert assignment.ignore is None and chosen.padding is None, "no query is left out of the class loss"
    assert_close("weights of the labels", torch.ones(chosen.positive.shape), arrays["label_weights"], 0)
    assert assignment.count == (stored["labels"] != background).sum(), "losses are divided by the positives"
    assert_close("references", reference, arrays["coords"], 1e-6)
    features = chosen.features.flatten()
    features = features[:: max(1, features.numel() // STORED)]
    assert_close("features", features, arrays["feats_sub"], 1e-6)


def keys_in_order(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Stand in for random keys: the first boxes are taken."""
    return torch.arange(shape[-1], dtype=torch.float32, device=device).expand(shape)


def _samples(meta: dict, stored: dict[str, Tensor]) -> Samples:
    """Return the head's boxes; every positive has an object of its own, numbered in their order."""
    positive = stored["in_labels"] != meta["num_classes"]
    batch, count = positive.shape
    seed = meta["feat_seed"]
    if meta["kind"] == "rcnn":
        features = _draw(seed + 50, batch, count, WIDTH)
    else:
        maps = [_draw(seed + i, batch, WIDTH, *shape) for i, shape in enumerate(meta["levels"])]
        features = torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2)
    number = (positive.cumsum(1) - 1) * positive
    return Samples(stored["in_coords"], positive, ~positive, number, features)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(*shape).astype(np.float32))


def _targets(stored: dict[str, Tensor], background: int, sizes: list[tuple[int, int]]) -> list[Target]:
    """Return the objects that the positives stand for, as the criterion gets them."""
    result = []
    for i, (labels, boxes, size) in enumerate(zip(stored["in_labels"], stored["in_targets"], sizes)):
        positive = labels != background
        relative = box_convert(boxes[positive], "xyxy", "cxcywh") / torch.tensor([size[1], size[0]] * 2)
        result.append(Target(labels[positive].long(), relative, i, size))
    return result
