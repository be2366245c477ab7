"""The multi-scale deformable attention layer (Deformable DETR, section 4.1; initial values: appendix A.4)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .fused import ms_deform_attn_fused, sampling_points
from .gather import is_portable
from .ms_deform_attn import ms_deform_attn
from .selection import fused


class MSDeformAttn(nn.Module):
    """Attend from every query to a few sampled points on every level of a feature pyramid.

    Offsets and attention weights are linear functions of the query; there are no keys.

    Args:
        d_model: width D of queries, memory and output.
        n_levels: number of feature levels.
        n_heads: number of heads; has to divide `d_model`.
        n_points: samples per head and level.

    Raises:
        ValueError: if `d_model` is not divisible by `n_heads`, or a number is not positive.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if min(d_model, n_levels, n_heads, n_points) < 1:
            raise ValueError(
                "MSDeformAttn needs positive numbers, found "
                f"d_model={d_model}, n_levels={n_levels}, n_heads={n_heads}, n_points={n_points}"
            )
        if d_model % n_heads:
            raise ValueError(f"d_model must be divisible by n_heads, found d_model={d_model} and n_heads={n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        # The order of the children is the order in published checkpoints.
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with uniform attention over rings of points around the reference, one direction per head.

        Call it after any initialisation that runs over all matrices of a model. Point k of head m starts k + 1 cells
        away in direction 2 pi m / heads, on a square (the larger coordinate is 1), on every level.
        """
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        rings = directions[:, None, None, :] * steps[:, None]  # (heads, 1, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(rings.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        level_shapes: Sequence[tuple[int, int]],
        padding: Tensor | None = None,
    ) -> Tensor:
        """Return the attended features (B, Q, D).

        Args:
            query: (B, Q, D).
            reference: (B, Q, levels, 2) points as (x, y), or (B, Q, levels, 4) boxes as (cx, cy, w, h), in 0..1 of
                each level's map, padding included. Offsets count cells for points and fractions of half the box,
                divided by `n_points`, for boxes.
            memory: (B, S, D), the levels one after the other, each row-major.
            level_shapes: (h, w) of each level as Python integers.
            padding: (B, S) bool, True on padded cells, whose values count as zero; None if there are none.

        Raises:
            ValueError: if shapes do not fit together.
        """
        self._check(query, reference, memory, level_shapes, padding)
        batch, queries, _ = query.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(2, (self.n_heads, self.d_model // self.n_heads))
        shape = (batch, queries, self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(query).view(*shape, 2)
        logits = self.attention_weights(query).view(shape)
        if offsets.dtype == torch.float64:  # reference points are made in float32, also for a float64 model
            reference = reference.double()
        if fused() and not is_portable():
            return self.output_proj(ms_deform_attn_fused(value, level_shapes, reference, offsets, logits))
        locations, weights = sampling_points(reference, offsets, logits, level_shapes)
        return self.output_proj(ms_deform_attn(value, level_shapes, locations, weights).to(value.dtype))

    def _check(self, query, reference, memory, level_shapes, padding) -> None:
        batch, queries = query.shape[:2]
        if len(level_shapes) != self.n_levels:
            raise ValueError(f"this MSDeformAttn reads {self.n_levels} levels, found {len(level_shapes)} level shapes")
        if reference.shape[:-1] != (batch, queries, self.n_levels) or reference.shape[-1] not in (2, 4):
            raise ValueError(
                f"reference must be (B, Q, levels, 2 or 4) with B={batch}, Q={queries}, levels={self.n_levels}, "
                f"found {tuple(reference.shape)}"
            )
        if padding is not None and (padding.shape != memory.shape[:2] or padding.dtype != torch.bool):
            raise ValueError(
                f"padding must be bool of shape (B, S) = {tuple(memory.shape[:2])}, "
                f"found {padding.dtype} of shape {tuple(padding.shape)}"
            )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half precision as float32, everything else as it is: a float64 model stays one."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
