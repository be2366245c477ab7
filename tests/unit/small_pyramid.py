"""Random pyramids and objects for the tests of auxiliary heads."""

from __future__ import annotations

import torch

from models.aux_heads.base import AuxHead, Objects, Pyramid

WIDTH = 32
CELLS = 8 * 12 + 4 * 6 + 2 * 3  # of `some_pyramid`


def some_objects(*images: list[tuple[float, float, float, float]]) -> Objects:
    """Pad the xyxy boxes of each image; labels count 0, 1, 2, 0, ..."""
    counts = [len(boxes) for boxes in images]
    most = max(1, *counts)
    result = Objects(
        torch.zeros(len(images), most, dtype=torch.int64),
        torch.zeros(len(images), most, 4),
        torch.arange(most) < torch.tensor(counts)[:, None],
        counts,
    )
    for i, boxes in enumerate(images):
        result.labels[i, : len(boxes)] = torch.arange(len(boxes)) % 3
        result.boxes[i, : len(boxes)] = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return result


def some_pyramid(
    sizes: list[tuple[int, int]], *, strides: tuple[int, ...] = (8, 16, 32), canvas: tuple[int, int] = (64, 96)
) -> Pyramid:
    shapes = [(-(-canvas[0] // s), -(-canvas[1] // s)) for s in strides]
    maps = [torch.randn(len(sizes), WIDTH, *shape) for shape in shapes]
    return Pyramid(maps, strides, sizes, sizes, canvas)


def build(head: type[AuxHead], strides: tuple[int, ...] = (8, 16, 32), **more) -> AuxHead:
    return head(num_classes=3, width=WIDTH, strides=strides, **more)
