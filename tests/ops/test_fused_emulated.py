"""The CUDA kernels that compute locations and weights themselves, run on the CPU a warp at a time."""

import pytest
import torch

from ops import reference
from tests.ops import emulated_cuda
from tests.ops.test_cuda_emulated import CASES, GENERIC, HALF, SHAPES, pytestmark  # noqa: F401


def draw(case, dtype, numbers):
    """Return value, reference points, offsets, logits and a gradient of the output; some samples lie outside."""
    batch, queries, heads, channels, shapes, points = CASES[case]
    samples = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    reference_points = torch.rand(batch, queries, len(shapes), numbers).to(reference.compute_dtype(dtype))
    drawn = (torch.randn(*samples, 2) * 2, torch.randn(samples) * 2, torch.randn(batch, queries, heads * channels))
    offsets, logits, grad = (tensor.to(dtype) for tensor in drawn)
    return value.to(dtype), reference_points, offsets, logits, grad


def computed(case, dtype, numbers, architecture=900, deterministic=False):
    """Return output and gradients of the kernels, and those of the definition in float64."""
    value, points, offsets, logits, grad = draw(case, dtype, numbers)
    shapes = CASES[case][4]
    source = (value, shapes, points, offsets, logits)
    found = (
        emulated_cuda.forward_fused(*source, architecture),
        *emulated_cuda.backward_fused(grad, *source, deterministic, architecture),
    )
    flat = [number for pair in shapes for number in pair]
    value, points, offsets, logits, grad = (t.double() for t in (value, points, offsets, logits, grad))
    source = (value, flat, points, offsets, logits)
    return found, (reference.fused_forward(*source), *reference.fused_backward(grad, *source))


def compare(found, wanted):
    for name, ours, theirs in zip("output value reference offsets logits".split(), found, wanted, strict=True):
        sums = 1e-13 if found[0].dtype == torch.float64 else 1e-5
        rounding = torch.finfo(ours.dtype).eps if ours.dtype in HALF else 0
        allowed = rounding * theirs.abs() + sums * theirs.abs().max()
        assert ((ours.double() - theirs).abs() <= allowed).all(), name


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_the_definition(case, numbers):
    compare(*computed(case, torch.float32, numbers))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ["a warp takes all heads of a query", "lanes without channels", GENERIC[0]])
def test_half_precision_is_read_and_summed_in_float32(case, dtype):
    compare(*computed(case, dtype, 4))


@pytest.mark.parametrize("case", ["one lane per head", "an encoder, by tiles"])
def test_gpus_that_add_one_number_at_a_time_compute_the_same(case):
    compare(*computed(case, torch.float32, 4, architecture=800))


def test_float64_is_computed_by_the_generic_kernels():
    compare(*computed(GENERIC[0], torch.float64, 4))


@pytest.mark.parametrize("case", ["a warp takes all heads of a query", GENERIC[0]])
def test_sums_in_fixed_point_are_as_close(case):
    compare(*computed(case, torch.float32, 2, deterministic=True))


def test_the_gradients_of_reference_points_are_left_out_where_nobody_wants_them():
    value, points, offsets, logits, grad = draw("lanes without channels", torch.float32, 4)
    source = (grad, value, SHAPES, points, offsets, logits)
    with_points = emulated_cuda.backward_fused(*source)
    without = emulated_cuda.backward_fused(*source, wants_reference=False)
    assert without[1] is None
    assert all(torch.equal(with_points[i], without[i]) for i in (2, 3))


def test_logits_far_apart_and_offsets_that_are_not_finite_leave_the_other_samples_alone():
    value, points, offsets, logits, _ = draw("lanes without channels", torch.float32, 2)
    logits[..., 0] = 200.0
    offsets[..., 1, 0] = torch.inf
    flat = [number for pair in SHAPES for number in pair]
    found = emulated_cuda.forward_fused(value, SHAPES, points, offsets, logits)
    torch.testing.assert_close(found, reference.fused_forward(value, flat, points, offsets, logits))
