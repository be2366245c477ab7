"""Multi-scale deformable attention as plain index arithmetic: the form that is written into exported graphs.

Exported graphs must not hold our operator, which no other runtime knows, and should not hold `grid_sample` either:
NVIDIA/TensorRT#4813 reports that TensorRT compiles its decomposition wrongly and says nothing. What is left here are
comparisons, multiplications and one lookup of rows per corner and level (ONNX: `Gather`), which every runtime has.

`portable()` chooses this form; it is no backend of its own, since it is slower than all of them and takes more memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, product

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import compute_dtype

_portable = False


@contextmanager
def portable() -> Iterator[None]:
    """Let the model compute with operations that every runtime computes alike, while a graph is recorded."""
    global _portable
    before, _portable = _portable, True
    try:
        yield
    finally:
        _portable = before


def is_portable() -> bool:
    """Return whether `portable()` is in force."""
    return _portable


def forward(value: Tensor, level_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and sum as `ops.reference.forward` does; differentiable by PyTorch, and sizes may be symbols.

    Args:
        value: (B, S, heads, D / heads), levels one after the other, each row-major.
        level_shapes: flat integers h0, w0, h1, w1, ...
        locations: (B, Q, heads, levels, points, 2) as (x, y); 0..1 covers a level from edge to edge, samples outside
            count as zero, and so do those that are not finite.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, D) in the type of `value`; half precision is computed in float32.
    """
    batch, cells, heads, width = value.shape
    dtype = compute_dtype(value.dtype)
    rows = value.to(dtype).reshape(batch * cells * heads, width)
    sizes = torch.tensor(level_shapes, device=value.device).view(-1, 2)  # (levels, 2) as (h, w)
    starts = torch.tensor([0, *accumulate(h * w for h, w in _pairs(level_shapes)[:-1])], device=value.device)[:, None]
    # Cell s of image b and head m is row (b S + s) heads + m.
    image = torch.arange(batch, device=value.device)[:, None, None, None, None] * cells
    head = torch.arange(heads, device=value.device)[:, None, None]
    columns = _neighbours(locations[..., 0].to(dtype), sizes[:, 1, None])
    lines = _neighbours(locations[..., 1].to(dtype), sizes[:, 0, None])
    total = value.new_zeros(batch, locations.shape[1], heads, width, dtype=dtype)
    for (row, row_share), (column, column_share) in product(lines, columns):
        index = (image + starts + row * sizes[:, 1, None] + column) * heads + head  # (B, Q, heads, levels, points)
        share = row_share * column_share * weights.to(dtype)
        found = F.embedding(index.flatten(3), rows)
        total = total + (found * share.flatten(3)[..., None]).sum(3)
    return total.flatten(2).to(value.dtype)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[0::2], flat[1::2], strict=True))


def _neighbours(location: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return index and share of the two cells beside `location`, which is relative to an axis of `size` cells.

    The share of a cell outside is 0 and its index that of some cell inside. So it is for what is not finite: every
    comparison with NaN is false.
    """
    position = location * size - 0.5
    first = position.floor()
    found = []
    for cell, share in ((first, first + 1 - position), (first + 1, position - first)):
        inside = (cell >= 0) & (cell < size)
        cell = torch.where(inside, cell, 0.0)
        found.append((cell.long(), torch.where(inside, share, 0.0)))
    return found
