"""Multi-scale deformable attention in plain PyTorch: the definition the compiled kernels are compared with.

Deformable DETR, section 4.1, equation (3), after the projections: every query reads `points` bilinear samples per
level and head and returns their weighted sum. Letters: B images, S cells of all levels together, Q queries, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfer import send

_FAR_OUTSIDE = 9.0  # in the [-1, 1] convention


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type sums are kept in: float64 for float64, float32 for float32 and both half precisions."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _levels(value: Tensor, level_shapes: Sequence[int]) -> list[Tensor]:
    """Cut value (B, S, heads, width) into one map (B * heads, width, h, w) per level."""
    batch, _, heads, width = value.shape
    shapes = list(zip(level_shapes[0::2], level_shapes[1::2], strict=True))
    parts = value.split([h * w for h, w in shapes], dim=1)
    return [
        part.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w) for part, (h, w) in zip(parts, shapes, strict=True)
    ]


def _grid(locations: Tensor, level: int) -> Tensor:
    """Return the sampling grid (B * heads, Q, points, 2) of one level in the [-1, 1] convention of grid_sample."""
    grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
    # What is not finite counts as far outside, as in the kernels; grid_sample would convert it to an arbitrary integer.
    return grid.nan_to_num(nan=_FAR_OUTSIDE, posinf=_FAR_OUTSIDE, neginf=_FAR_OUTSIDE)


def _weights(weights: Tensor, level: int) -> Tensor:
    """Return the attention weights (B * heads, 1, Q, points) of one level."""
    return weights[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)


def _sample(level_map: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(level_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def forward(value: Tensor, level_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Sample and sum; differentiable, any device.

    Args:
        value: (B, S, heads, D / heads), levels one after the other, each row-major.
        level_shapes: flat integers h0, w0, h1, w1, ...
        locations: (B, Q, heads, levels, points, 2) as (x, y); 0..1 covers a level from edge to edge, samples outside
            count as zero.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, D) in the type of `value`; half precision is computed in float32.
    """
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    if value.numel() == 0 or locations.numel() == 0:  # grid_sample refuses empty inputs
        return value.new_zeros(batch, queries, heads * width)
    dtype = compute_dtype(value.dtype)
    locations, weights = locations.to(dtype), weights.to(dtype)
    total = value.new_zeros(batch * heads, width, queries, dtype=dtype)
    for level, level_map in enumerate(_levels(value.to(dtype), level_shapes)):
        total = total + (_sample(level_map, _grid(locations, level)) * _weights(weights, level)).sum(-1)
    return total.view(batch, heads * width, queries).transpose(1, 2).to(value.dtype).contiguous()


def backward(
    grad_output: Tensor, value: Tensor, level_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `forward` with respect to value, locations and weights, each of its input's type.

    Written out because the registered operator runs below autograd, where nothing is recorded. `grad_output` is
    (B, Q, D), the rest as in `forward`.
    """
    if value.numel() == 0 or locations.numel() == 0:
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (value, locations, weights))
    batch, cells, heads, width = value.shape
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    dtype = compute_dtype(value.dtype)
    wide_locations, wide_weights = locations.to(dtype), weights.to(dtype)
    grad = grad_output.to(dtype).transpose(1, 2).reshape(batch * heads, width, queries, 1)
    grad_value, grad_locations, grad_weights = [], [], []
    for level, level_map in enumerate(_levels(value.to(dtype), level_shapes)):
        grid, weight = _grid(wide_locations, level), _weights(wide_weights, level)
        grad_weights.append((_sample(level_map, grid) * grad).sum(1))
        # 0, 0, False: bilinear, zero padding, align_corners off, as in _sample
        grad_map, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            (grad * weight).contiguous(), level_map, grid, 0, 0, False, (True, True)
        )
        grad_value.append(grad_map.flatten(2))
        grad_locations.append(2 * grad_grid)
    grad_value = torch.cat(grad_value, 2).view(batch, heads, width, cells).permute(0, 3, 1, 2)
    grad_locations = torch.stack(grad_locations, 2).view(batch, heads, queries, levels, points, 2).transpose(1, 2)
    grad_weights = torch.stack(grad_weights, 2).view(batch, heads, queries, levels, points).transpose(1, 2)
    return (
        grad_value.to(value.dtype).contiguous(),
        grad_locations.to(locations.dtype).contiguous(),
        grad_weights.to(weights.dtype).contiguous(),
    )


def locations(reference_points: Tensor, offsets: Tensor, level_shapes: Sequence[int]) -> Tensor:
    """Return the locations (B, Q, heads, levels, points, 2) of the samples, as (x, y) in 0..1 of their level.

    Args:
        reference_points: (B, Q, levels, 2) points, or (B, Q, levels, 4) boxes as (cx, cy, w, h).
        offsets: (B, Q, heads, levels, points, 2), counting cells for points and fractions of half the box, divided by
            the number of points, for boxes.
        level_shapes: flat integers h0, w0, h1, w1, ...
    """
    points = reference_points[:, :, None, :, None, :]
    if points.shape[-1] == 4:
        return points[..., :2] + offsets / offsets.shape[4] * points[..., 2:] * 0.5
    return points + offsets / _sizes(level_shapes, offsets)


def softmax(logits: Tensor) -> Tensor:
    """Return the weights of samples with logits (B, Q, heads, levels, points); they sum to 1 over levels and points."""
    return logits.flatten(3).softmax(-1).view(logits.shape)


def fused_forward(
    value: Tensor, level_shapes: Sequence[int], reference_points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Return `forward` for the locations and weights that reference points, offsets and logits stand for."""
    dtype = compute_dtype(value.dtype)
    where = locations(reference_points.to(dtype), offsets.to(dtype), level_shapes)
    return forward(value, level_shapes, where, softmax(logits.to(dtype)))


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    level_shapes: Sequence[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `fused_forward` with respect to its four tensors, each of its tensor's type."""
    dtype = compute_dtype(value.dtype)
    points, wide = reference_points.to(dtype), offsets.to(dtype)
    weights = softmax(logits.to(dtype))
    grad_value, by_place, by_weight = backward(
        grad_output, value, level_shapes, locations(points, wide, level_shapes), weights
    )
    mean = (weights * by_weight).sum((-1, -2), keepdim=True)
    by_points = by_place.sum((2, 4))
    if points.shape[-1] == 4:
        share = 0.5 / offsets.shape[4]
        by_points = torch.cat([by_points, (by_place * wide).sum((2, 4)) * share], -1)
        by_offset = by_place * points[:, :, None, :, None, 2:] * share
    else:
        by_offset = by_place / _sizes(level_shapes, wide)
    return (
        grad_value,
        by_points.to(reference_points.dtype),
        by_offset.to(offsets.dtype),
        (weights * (by_weight - mean)).to(logits.dtype),
    )


def _sizes(level_shapes: Sequence[int], like: Tensor) -> Tensor:
    """Return width and height of each level as (levels, 1, 2), with the type and device of `like`."""
    pairs = list(zip(level_shapes[1::2], level_shapes[0::2], strict=True))
    sizes = torch.tensor(pairs, dtype=like.dtype)
    return send(sizes, like.device)[:, None, :]  # a plain copy would wait for the GPU in every layer
