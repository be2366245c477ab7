"""Deformable attention from what its layer projects: reference points, offsets and logits, in one PyTorch operator.

The layer's arithmetic between its projections and the sampling (locations from offsets, weights by softmax) happens
where the samples are read, and again in the backward pass. Locations and weights are therefore never in memory, and
what a backward pass needs is kept in the type of the projections: half as much under autocast. Everything is computed
in float32 all the same, as a location rounded to bfloat16 is off by up to a third of a cell on a map 167 cells wide.

`assigndetr::ms_deform_attn_fused` follows `ops.selection` like the operator that takes locations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .ms_deform_attn import check_shapes, check_types, flatten
from .selection import active_backend

FORWARD, BACKWARD = "assigndetr::ms_deform_attn_fused", "assigndetr::ms_deform_attn_fused_backward"

_ARGUMENTS = "Tensor value, SymInt[] level_shapes, Tensor reference_points, Tensor offsets, Tensor logits"
torch.library.define(FORWARD, f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    BACKWARD,
    f"(Tensor grad_output, {_ARGUMENTS}, bool wants_reference) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def ms_deform_attn_fused(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]] | Sequence[int] | Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Return `ms_deform_attn(value, level_shapes, *sampling_points(reference_points, offsets, logits, level_shapes))`.

    Differentiable once, for all four tensors, and repeatable under the same conditions. Autocast changes nothing:
    half precision is read as it is and summed in float32.

    Args:
        value: (B, S, heads, D / heads), the levels one after the other, each row-major.
        level_shapes: (h, w) of each level, as for `ms_deform_attn`.
        reference_points: (B, Q, levels, 2) points as (x, y), or (B, Q, levels, 4) boxes as (cx, cy, w, h), in 0..1 of
            each level's map; read in float32 at least.
        offsets: (B, Q, heads, levels, points, 2), counting cells for points and fractions of half the box, divided by
            the number of points, for boxes.
        logits: (B, Q, heads, levels, points); their softmax over levels and points are the weights.

    Returns:
        (B, Q, D), heads one after the other, in the type of `value`.

    Raises:
        ValueError: if shapes, types or devices do not fit together, or a forced backend cannot compute them.
    """
    shapes = flatten(level_shapes)
    _check(value, shapes, reference_points, offsets, logits)
    reference_points = reference_points.to(reference.compute_dtype(value.dtype))
    # The kernels read one type. The wider one loses nothing, and mixtures are rare: autocast projects all three alike.
    wide = torch.promote_types(value.dtype, torch.promote_types(offsets.dtype, logits.dtype))
    output = torch.ops.assigndetr.ms_deform_attn_fused(
        value.to(wide), shapes, reference_points, offsets.to(wide), logits.to(wide)
    )
    return output.to(value.dtype)


def sampling_points(
    reference_points: Tensor, offsets: Tensor, logits: Tensor, level_shapes: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return the locations (B, Q, heads, levels, points, 2) and weights (B, Q, heads, levels, points) of the samples.

    The arguments are those of `ms_deform_attn_fused`; half precision is computed in float32, and so returned.
    """
    dtype = reference.compute_dtype(logits.dtype)
    flat = [n for pair in level_shapes for n in pair]
    locations = reference.locations(reference_points.to(dtype), offsets.to(dtype), flat)
    return locations, reference.softmax(logits.to(dtype))


@torch.library.impl(FORWARD, "default")
def _forward(value: Tensor, level_shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor):
    backend = active_backend(value.device)
    if backend == "reference":
        return reference.fused_forward(value, level_shapes, reference_points, offsets, logits)
    kernel = getattr(torch.ops.assigndetr_ext, f"forward_fused_{backend}")
    points = (tensor.contiguous() for tensor in (reference_points, offsets, logits))
    return kernel(value.contiguous(), level_shapes, *points)


@torch.library.impl(BACKWARD, "default")
def _backward(
    grad_output: Tensor,
    value: Tensor,
    level_shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    wants_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = active_backend(value.device)
    if backend == "reference":
        grads = reference.fused_backward(grad_output, value, level_shapes, reference_points, offsets, logits)
        return (grads[0], grads[1] if wants_reference else reference_points.new_empty(0), *grads[2:])
    kernel = getattr(torch.ops.assigndetr_ext, f"backward_fused_{backend}")
    points = (tensor.contiguous() for tensor in (reference_points, offsets, logits))
    grads = kernel(grad_output.to(value.dtype).contiguous(), value.contiguous(), level_shapes, *points, wants_reference)
    own = (value, reference_points, offsets, logits)
    return tuple(grad.to(tensor.dtype) for grad, tensor in zip(grads, own, strict=True))


@torch.library.register_fake(FORWARD)
def _forward_shape(value: Tensor, level_shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor):
    batch, _, heads, width = value.shape
    return value.new_empty(batch, logits.shape[1], heads * width)


@torch.library.register_fake(BACKWARD)
def _backward_shape(
    grad_output: Tensor,
    value: Tensor,
    level_shapes: list[int],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
    wants_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_reference = reference_points.new_empty(reference_points.shape if wants_reference else 0)
    return (
        value.new_empty(value.shape),
        by_reference,
        offsets.new_empty(offsets.shape),
        logits.new_empty(logits.shape),
    )


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.level_shapes, *points = inputs
    ctx.save_for_backward(value, *points)


def _differentiate(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, *points = ctx.saved_tensors
    wants_reference = ctx.needs_input_grad[2]
    grads = torch.ops.assigndetr.ms_deform_attn_fused_backward(
        grad_output, value, ctx.level_shapes, *points, wants_reference
    )
    return grads[0], None, grads[1] if wants_reference else None, *grads[2:]


def _refuse_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("ms_deform_attn_fused has no second derivative")


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(BACKWARD, _refuse_second_derivative)


def _check(value: Tensor, shapes: list[int], reference_points: Tensor, offsets: Tensor, logits: Tensor) -> None:
    check_types({"value": value, "reference_points": reference_points, "offsets": offsets, "logits": logits})
    check_shapes(value, shapes, offsets, logits, ("offsets", "logits"))
    expected = (*logits.shape[:2], len(shapes) // 2)
    if reference_points.shape[:-1] != expected or reference_points.shape[-1] not in (2, 4):
        raise ValueError(
            f"reference_points must be (B, Q, levels, 2 or 4) with B, Q, levels = {expected} to fit level_shapes and "
            f"logits, found {tuple(reference_points.shape)}"
        )
