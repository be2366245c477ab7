"""Multi-scale deformable attention as one PyTorch operator (Deformable DETR, section 4.1, equation (3)).

`assigndetr::ms_deform_attn` carries schema, shape function, gradient and autocast rule. Which code computes it is
decided at run time by `ops.selection`, below the dispatcher, so that compiled graphs do not change with the backend.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import gather, reference
from .selection import active_backend

FORWARD, BACKWARD = "assigndetr::ms_deform_attn", "assigndetr::ms_deform_attn_backward"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_LEVELS = 128  # kMaxLevels in csrc/bilinear.h

_AUTOCAST_IN_OPERATOR = hasattr(torch.library, "register_autocast")  # PyTorch 2.7 and later

_ARGUMENTS = "Tensor value, SymInt[] level_shapes, Tensor locations, Tensor weights"
torch.library.define(FORWARD, f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    BACKWARD, f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


def ms_deform_attn(
    value: Tensor,
    level_shapes: Sequence[tuple[int, int]] | Sequence[int] | Tensor,
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sum bilinear samples of a feature pyramid: out = sum over levels and points of weight * value at location.

    Differentiable once, for all three tensors. Half precision is summed in float32, and under autocast the operator
    runs in float32 altogether. On the CPU the results are the same bits in every run. So they are on a GPU with
    `torch.use_deterministic_algorithms(True)`: the gradient of `value` is then summed in fixed point, in 62 bits whose
    range follows the largest numbers, and is NaN as a whole if any number of the output's gradient is not finite.
    Without it, the additions to that gradient come in any order and its last places differ from run to run.

    Args:
        value: (B, S, heads, D / heads), the levels one after the other, each row-major.
        level_shapes: (h, w) of each level as Python integers, or flat h0, w0, h1, w1, ...; an integer tensor of shape
            (levels, 2), as the published code passes it, if it is on the CPU.
        locations: (B, Q, heads, levels, points, 2) as (x, y); 0..1 covers a level from edge to edge. Cells outside the
            map count as zero, and so do samples that are not finite.
        weights: (B, Q, heads, levels, points).

    Returns:
        (B, Q, D), heads one after the other, in the type of `value` (float32 under autocast).

    Raises:
        ValueError: if shapes, types or devices do not fit together, or a forced backend cannot compute them.
    """
    shapes = _flatten(level_shapes)
    _check(value, shapes, locations, weights)
    if not _AUTOCAST_IN_OPERATOR and torch.is_autocast_enabled(value.device.type):
        value, locations, weights = (t if t.dtype == torch.float64 else t.float() for t in (value, locations, weights))
    if gather.is_portable():
        return gather.forward(value, shapes, locations, weights)
    return torch.ops.assigndetr.ms_deform_attn(value, shapes, locations, weights)


@torch.library.impl(FORWARD, "default")
def _forward(value: Tensor, level_shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    backend = active_backend(value.device)
    if backend == "reference":
        return reference.forward(value, level_shapes, locations, weights)
    kernel = getattr(torch.ops.assigndetr_ext, f"forward_{backend}")
    sums = reference.compute_dtype(value.dtype)
    return kernel(value.contiguous(), level_shapes, _dense(locations, sums), _dense(weights, sums))


@torch.library.impl(BACKWARD, "default")
def _backward(
    grad_output: Tensor, value: Tensor, level_shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    backend = active_backend(value.device)
    if backend == "reference":
        return reference.backward(grad_output, value, level_shapes, locations, weights)
    kernel = getattr(torch.ops.assigndetr_ext, f"backward_{backend}")
    sums = reference.compute_dtype(value.dtype)
    grad_value, grad_locations, grad_weights = kernel(
        _dense(grad_output, value.dtype),
        value.contiguous(),
        level_shapes,
        _dense(locations, sums),
        _dense(weights, sums),
    )
    return grad_value.to(value.dtype), grad_locations.to(locations.dtype), grad_weights.to(weights.dtype)


@torch.library.register_fake(FORWARD)
def _forward_shape(value: Tensor, level_shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, _, heads, width = value.shape
    return value.new_empty(batch, locations.shape[1], heads * width)


@torch.library.register_fake(BACKWARD)
def _backward_shape(
    grad_output: Tensor, value: Tensor, level_shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.level_shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.assigndetr.ms_deform_attn_backward(grad_output, value, ctx.level_shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


def _refuse_second_derivative(ctx, *grads: Tensor) -> None:
    raise NotImplementedError("ms_deform_attn has no second derivative")


torch.library.register_autograd(FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(BACKWARD, _refuse_second_derivative)
if _AUTOCAST_IN_OPERATOR:
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(FORWARD, _device, torch.float32)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _flatten(level_shapes: Sequence[tuple[int, int]] | Sequence[int] | Tensor) -> list[int]:
    """Return h0, w0, h1, w1, ... as a list."""
    if isinstance(level_shapes, Tensor) and level_shapes.device.type != "cpu":
        raise ValueError(
            f"level_shapes must be Python integers or a tensor on the CPU, found one on {level_shapes.device}; reading "
            "it would stall the device in every layer"
        )
    if hasattr(level_shapes, "tolist"):  # a tensor, or an array of NumPy
        level_shapes = level_shapes.tolist()
    flat = [n for entry in level_shapes for n in (entry if isinstance(entry, (tuple, list)) else (entry,))]
    if any(not isinstance(n, (int, torch.SymInt)) for n in flat):
        raise ValueError(f"level_shapes must be Python integers, found {level_shapes}")
    return flat


def _check(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> None:
    tensors = {"value": value, "locations": locations, "weights": weights}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {allowed}")
    if len({tensor.dtype == torch.float64 for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise ValueError(f"either all of value, locations, weights are float64 or none, found {found}")
    if not value.device == locations.device == weights.device:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"value, locations and weights must be on one device, found {found}")
    if value.ndim != 4:
        raise ValueError(f"value must be (B, S, heads, D / heads), found {tuple(value.shape)}")
    if weights.ndim != 5:
        raise ValueError(f"weights must be (B, Q, heads, levels, points), found {tuple(weights.shape)}")
    if not shapes or len(shapes) % 2 or len(shapes) > 2 * MAX_LEVELS or min(shapes) < 1:
        raise ValueError(f"level_shapes must be 1 to {MAX_LEVELS} pairs (h, w) of positive integers, found {shapes}")
    cells = sum(h * w for h, w in zip(shapes[0::2], shapes[1::2], strict=True))
    if cells != value.shape[1]:
        raise ValueError(f"level_shapes {shapes} count {cells} cells, but value has {value.shape[1]}")
    expected = (value.shape[0], weights.shape[1], value.shape[2], len(shapes) // 2, weights.shape[4])
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"weights must be (B, Q, heads, levels, points) = {expected} to fit value and level_shapes, "
            f"found {tuple(weights.shape)}"
        )
    if tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"locations must be (B, Q, heads, levels, points, 2) = {(*expected, 2)} to fit value, level_shapes and "
            f"weights, found {tuple(locations.shape)}"
        )
