"""A detector that is small enough to be built and run hundreds of times."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import torch

from util.args import get_args_parser
from util.structures import ImageBatch, Target

TINY = (
    "--backbone resnet18 --backbone_weights none --hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 "
    "--dim_feedforward 48 --dropout 0 --num_queries 8 --num_classes 4"
)
TWO_STAGE = "--with_box_refine --two_stage"


def tiny_args(flags: str = "") -> Namespace:
    """Return the arguments of a tiny model plus `flags`, which win."""
    return get_args_parser().parse_args(f"{TINY} {flags}".split())


def tiny_images(sizes: Sequence[tuple[int, int]] = ((64, 64), (48, 57)), canvas: tuple[int, int] | None = None):
    """Return random images of `sizes` (h, w) on one canvas; the same pixels for every canvas."""
    height, width = canvas or (max(h for h, _ in sizes), max(w for _, w in sizes))
    pixels = torch.zeros(len(sizes), 3, height, width)
    padding = torch.ones(len(sizes), height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(sizes):
        pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=torch.Generator().manual_seed(i))
        padding[i, :h, :w] = False
    return ImageBatch(pixels, padding, list(sizes))


def make_target(boxes: Sequence[Sequence[float]] = (), labels: Sequence[int] = (), image_id: int = 0) -> Target:
    """Return a target from lists; no list at all is an image without objects."""
    return Target(
        torch.tensor(labels, dtype=torch.long),
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        image_id=image_id,
        orig_size=(64, 64),
    )


def tiny_targets() -> list[Target]:
    """Return two objects for the first image and none for the second."""
    return [
        make_target([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]], [1, 3], image_id=7),
        make_target(image_id=8),
    ]
