"""The CUDA kernels on the CPU: the same source, compiled by the C++ compiler (emulated_cuda.h) and called by ctypes."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch

import ops

_HERE = Path(__file__).resolve().parent
_CSRC = Path(ops.__file__).resolve().parent / "csrc"
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@functools.cache
def compiled(architecture: int) -> ctypes.CDLL:
    """Compile the kernels of attention as for `architecture`, such as 900: they differ in how they add to memory."""
    library = _compile("emulated_cuda.cpp", f"-DASSIGNDETR_ADDS_FOUR={int(architecture >= 900)}")
    for name in ("forward", "backward", "forward_fused", "backward_fused"):
        getattr(library, name).restype = ctypes.c_char_p
    library.items_of.restype = ctypes.c_int64
    return library


@functools.cache
def compiled_solver() -> ctypes.CDLL:
    """Compile the solver of assignment problems."""
    library = _compile("emulated_assignment.cpp")
    library.assign.restype = library.drop_columns.restype = ctypes.c_int64
    return library


def _compile(source: str, *definitions: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "emulated.so"
        includes = [f"-I{_CSRC}", f"-I{_HERE}", f"-I{Path(torch.__file__).parent / 'include'}"]
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *definitions]
        command = [*os.environ.get("CXX", "c++").split(), *flags, *includes]
        done = subprocess.run([*command, "-o", path, _HERE / source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(path))


def _numbers(values) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


def _address(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(shapes, sizes) -> tuple:
    return _numbers([n for pair in shapes for n in pair]), ctypes.c_int64(len(shapes)), _numbers(sizes)


def plan_of(shapes, batch, queries, heads, channels, points) -> dict | None:
    """Return lanes of an item, rounds, tiles and blocks of an image; None where the generic kernels compute."""
    cells = sum(h * w for h, w in shapes)
    rounds, tiles, blocks = ctypes.c_int(), ctypes.c_int(), ctypes.c_int64()
    results = [ctypes.byref(number) for number in (rounds, tiles, blocks)]
    lanes = compiled(900).plan_of(*_call(shapes, (batch, cells, queries, heads, channels, points)), *results)
    return (
        {"lanes": lanes, "rounds": rounds.value, "tiles": bool(tiles.value), "blocks": blocks.value} if lanes else None
    )


def items_of(shapes, queries, heads, channels, image, rounds) -> list[int]:
    """Return the (image, query, head), as one number, in the order in which an image's warps take them."""
    cells = sum(h * w for h, w in shapes)
    found = (ctypes.c_int64 * (2 * queries * heads + 1))()
    sizes = (image + 1, cells, queries, heads, channels, 1)
    count = compiled(900).items_of(*_call(shapes, sizes), ctypes.c_int64(image), rounds, found)
    return list(found[:count])


def _sizes(value, locations) -> tuple[int, ...]:
    batch, cells, heads, channels = value.shape
    return batch, cells, locations.shape[1], heads, channels, locations.shape[4]


def forward(value, shapes, locations, weights, architecture=900) -> torch.Tensor:
    """Return what the CUDA kernel would: see ops.ms_deform_attn."""
    output = torch.full((*locations.shape[:2], value.shape[2] * value.shape[3]), torch.nan, dtype=value.dtype)
    error = compiled(architecture).forward(
        _TYPES.index(value.dtype),
        _address(value),
        *_call(shapes, _sizes(value, locations)),
        *(_address(tensor) for tensor in (locations, weights, output)),
    )
    assert error is None, error
    return output


def backward(grad_output, value, shapes, locations, weights, deterministic=False, architecture=900):
    """Return the gradients of value, locations and weights, in the type of the sums."""
    grads = [torch.full(t.shape, torch.nan, dtype=locations.dtype) for t in (value, locations, weights)]
    fixed = [None] * 3
    if deterministic:
        largest = [tensor.abs().max().to(locations.dtype) for tensor in (grad_output, weights)]
        fixed = [torch.zeros(value.shape, dtype=torch.int64), *largest]
    else:
        grads[0].zero_()
    error = compiled(architecture).backward(
        _TYPES.index(value.dtype),
        _address(grad_output),
        _address(value),
        *_call(shapes, _sizes(value, locations)),
        *(_address(tensor) for tensor in (locations, weights, *grads, *fixed)),
    )
    assert error is None, error
    return tuple(grads)


def assign(
    costs: torch.Tensor,
    problems: torch.Tensor,
    unmatchable: float = 1e6,
    shared_bytes: int = 100 << 10,
    backwards: bool = False,
) -> tuple[torch.Tensor, list[int]]:
    """Return what the CUDA solver would, and how many problems are small, large, and large with scratch memory.

    Args:
        costs, problems: see ops.assignment.solve.
        shared_bytes: that a block of the GPU may have.
        backwards: run the last threads of a block first.
    """
    room = int(torch.minimum(problems[:, 2], problems[:, 1] * problems[:, 4]).sum())
    pairs = torch.full((3, room), -1, dtype=torch.int64)
    kinds = (ctypes.c_int64 * 3)()
    found = compiled_solver().assign(
        _address(costs),
        _address(problems),
        ctypes.c_int64(len(problems)),
        ctypes.c_float(unmatchable),
        ctypes.c_int64(shared_bytes),
        ctypes.c_int(backwards),
        ctypes.c_int64(room),
        _address(pairs),
        kinds,
    )
    assert found == room
    return pairs, list(kinds)


def pair_costs(logits, boxes, labels, targets, image, *, class_weight, l1_weight, giou_weight, giou_eps=0.0):
    """Return what the CUDA kernel would: see ops.pair_cost. AssertionError where it would stop."""
    layers, batch, slots, classes = logits.shape
    costs = torch.full((len(labels), layers, slots), torch.nan)
    done = compiled_solver().pair_costs_of(
        int(logits.dtype == torch.bfloat16),
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_void_p(boxes.data_ptr()),
        *(_address(tensor) for tensor in (labels, image, targets)),
        _numbers((len(labels), layers, batch, slots, classes, *logits.stride(), *boxes.stride())),
        (ctypes.c_float * 4)(class_weight, l1_weight, giou_weight, giou_eps),
        _address(costs),
    )
    assert done, "a label or an image does not exist"
    return costs


def drop_columns(
    cost: torch.Tensor, repeat: int = 1, warps: int = 4, unmatchable: float = 1e6
) -> tuple[list[int], torch.Tensor]:
    """Return the columns that the CUDA solver looks at, and their costs (rows, columns): NaN if it looks at all.

    Args:
        cost: (targets, slots) float32; its rows may lie apart.
        repeat: see ops.assignment.solve.
        warps: of the block: 1 or 4.
    """
    targets, slots = cost.shape
    rows, columns = (slots, targets * repeat) if targets * repeat > slots else (targets, slots)
    left, kept = torch.full((columns,), -1, dtype=torch.int32), torch.full((rows * columns,), torch.nan)
    count = compiled_solver().drop_columns(
        ctypes.c_void_p(cost.data_ptr()),
        _numbers((targets, slots, cost.stride(0), repeat)),
        warps,
        ctypes.c_float(unmatchable),
        _address(left),
        _address(kept),
    )
    assert count >= 0
    return list(range(columns)) if count == columns else left[:count].tolist(), kept[: rows * count].view(rows, count)


def forward_fused(value, shapes, reference_points, offsets, logits, architecture=900) -> torch.Tensor:
    """Return what the CUDA kernel would: see ops.ms_deform_attn_fused."""
    output = torch.full((*logits.shape[:2], value.shape[2] * value.shape[3]), torch.nan, dtype=value.dtype)
    error = compiled(architecture).forward_fused(
        _TYPES.index(value.dtype),
        _address(value),
        *_call(shapes, _sizes(value, logits)),
        reference_points.shape[-1],
        *(_address(tensor) for tensor in (reference_points, offsets, logits, output)),
    )
    assert error is None, error
    return output


def backward_fused(
    grad_output,
    value,
    shapes,
    reference_points,
    offsets,
    logits,
    deterministic=False,
    architecture=900,
    wants_reference=True,
):
    """Return the gradients of value, reference points, offsets and logits; all but the third in the type of sums."""
    sums = reference_points.dtype
    heads, numbers = value.shape[2], reference_points.shape[-1]
    by_head = torch.full((*logits.shape[:2], heads, len(shapes), numbers), torch.nan, dtype=sums)
    grads = [torch.full(value.shape, torch.nan, dtype=sums), by_head if wants_reference else None]
    grads += [torch.full_like(offsets, torch.nan), torch.full(logits.shape, torch.nan, dtype=sums)]
    fixed = [None] * 3
    if deterministic:
        largest = [grad_output.abs().max().to(sums), torch.ones((), dtype=sums)]
        fixed = [torch.zeros(value.shape, dtype=torch.int64), *largest]
    else:
        grads[0].zero_()
    error = compiled(architecture).backward_fused(
        _TYPES.index(value.dtype),
        _address(grad_output),
        _address(value),
        *_call(shapes, _sizes(value, logits)),
        numbers,
        *(_address(tensor) for tensor in (reference_points, offsets, logits, *grads, *fixed)),
    )
    assert error is None, error
    return grads[0], by_head.sum(2) if wants_reference else None, *grads[2:]
