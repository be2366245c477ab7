"""The source of the CUDA kernels, run on the CPU a warp at a time: what needs no GPU to be right or wrong."""

import os
import shutil

import pytest
import torch

from ops import reference
from tests.ops import emulated_cuda

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None or not hasattr(os, "fork"),
    reason="no C++ compiler, or a system without coroutines in C",
)

SHAPES = ((11, 13), (9, 7), (1, 4), (1, 1))  # 211 cells
FIVE = ((6, 5), (4, 4), (3, 2), (2, 3), (1, 1))
# name -> images, queries, heads, channels of a head, level shapes, points
CASES = {
    "a warp takes all heads of a query": (2, 9, 8, 32, SHAPES, 4),
    "an encoder, by tiles": (2, 211, 2, 32, SHAPES, 4),
    "lanes without channels": (1, 9, 3, 24, SHAPES, 4),
    "one lane per head": (2, 40, 3, 8, SHAPES, 4),
    "two lanes per head": (2, 9, 3, 16, SHAPES, 3),
    "eight lanes, eight points": (2, 5, 3, 64, FIVE, 8),
    "sixteen lanes, one level, seven points": (3, 5, 1, 128, ((5, 6),), 7),
    "ten parts of sixteen lanes": (1, 5, 2, 80, FIVE, 4),
    "one query, one head, one point": (1, 1, 1, 32, ((2, 2),), 1),
    "a width that is no multiple of 8": (2, 5, 3, 20, SHAPES, 4),
    "seventeen levels": (2, 3, 2, 16, ((2, 2),) * 17, 2),
}
GENERIC = ("a width that is no multiple of 8", "seventeen levels")
HALF = (torch.float16, torch.bfloat16)


def draw(case, dtype):
    """Return value, locations, weights and a gradient of the output; a third of the samples lie outside."""
    batch, queries, heads, channels, shapes, points = CASES[case]
    sums = reference.compute_dtype(dtype)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, channels)
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2) * 1.4 - 0.2
    weights = torch.randn(locations.shape[:-1])
    grad = torch.randn(batch, queries, heads * channels)
    return value.to(dtype), locations.to(sums), weights.to(sums), grad.to(dtype)


def defined(value, locations, weights, grad, shapes):
    """Return output and gradients in float64."""
    flat = [number for pair in shapes for number in pair]
    value, locations, weights, grad = (t.double() for t in (value, locations, weights, grad))
    return (
        reference.forward(value, flat, locations, weights),
        *reference.backward(grad, value, flat, locations, weights),
    )


def computed(case, dtype, architecture=900, deterministic=False):
    value, locations, weights, grad = draw(case, dtype)
    shapes = CASES[case][4]
    found = (
        emulated_cuda.forward(value, shapes, locations, weights, architecture),
        *emulated_cuda.backward(grad, value, shapes, locations, weights, deterministic, architecture),
    )
    return found, defined(value, locations, weights, grad, shapes)


def compare(found, wanted, value_type):
    for name, ours, theirs in zip("output value locations weights".split(), found, wanted, strict=True):
        sums = 1e-13 if ours.dtype == torch.float64 else 4e-6
        rounding = torch.finfo(ours.dtype).eps if name == "output" and value_type in HALF else 0
        allowed = rounding * theirs.abs() + sums * theirs.abs().max()
        assert ((ours.double() - theirs).abs() <= allowed).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_compute_the_definition(case, dtype):
    batch, queries, heads, channels, shapes, points = CASES[case]
    assert (emulated_cuda.plan_of(shapes, batch, queries, heads, channels, points) is None) == (case in GENERIC)
    compare(*computed(case, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["lanes without channels", "a warp takes all heads of a query", "one lane per head"])
def test_gpus_that_add_one_number_at_a_time_compute_the_same(case, dtype):
    compare(*computed(case, dtype, architecture=800), dtype)


@pytest.mark.parametrize("case", ["an encoder, by tiles", "a width that is no multiple of 8"])
def test_float64_is_computed_by_the_generic_kernels(case):
    compare(*computed(case, torch.float64), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["a warp takes all heads of a query", "an encoder, by tiles", *GENERIC])
def test_sums_in_fixed_point_are_as_close(case, dtype):
    compare(*computed(case, dtype, deterministic=True), dtype)


def test_sums_in_fixed_point_do_not_depend_on_the_order_of_the_queries():
    value, locations, weights, grad = draw("an encoder, by tiles", torch.float32)
    turned = [tensor.flip(1).contiguous() for tensor in (locations, weights, grad)]
    gradients = {}
    for fixed in (False, True):
        straight = emulated_cuda.backward(grad, value, SHAPES, locations, weights, fixed)
        backwards = emulated_cuda.backward(turned[2], value, SHAPES, turned[0], turned[1], fixed)
        gradients[fixed] = straight[0], backwards[0]
    assert torch.equal(*gradients[True])
    assert not torch.equal(*gradients[False])  # else this test shows nothing


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_fixed_point_follows_the_size_of_the_gradients(size):
    value, locations, weights, grad = draw("lanes without channels", torch.float32)
    wanted = emulated_cuda.backward(grad, value, SHAPES, locations, weights)[0]
    found = emulated_cuda.backward(grad * size, value, SHAPES, locations, weights, True)[0]
    torch.testing.assert_close(found.double() / size, wanted.double(), rtol=0, atol=1e-5)


def test_fixed_point_has_room_for_samples_that_all_see_one_cell():
    queries, points = 300, 8
    value = torch.zeros(1, 1, 1, 8)
    locations, weights = torch.full((1, queries, 1, 1, points, 2), 0.5), torch.ones(1, queries, 1, 1, points)
    grad = torch.full((1, queries, 8), 1.999)
    found = emulated_cuda.backward(grad, value, ((1, 1),), locations, weights, True)[0]
    torch.testing.assert_close(found, torch.full_like(value, 1.999 * queries * points), rtol=1e-6, atol=0)


@pytest.mark.parametrize("number", [0.0, torch.inf, torch.nan])
def test_fixed_point_gives_zero_for_zeros_and_no_number_if_a_gradient_is_not_finite(number):
    value, locations, weights, grad = draw("lanes without channels", torch.float32)
    if number == 0:
        found = emulated_cuda.backward(grad * 0, value, SHAPES, locations, weights, True)[0]
        assert torch.equal(found, torch.zeros_like(value))
    else:
        grad[0, 0, 0] = number
        assert emulated_cuda.backward(grad, value, SHAPES, locations, weights, True)[0].isnan().all()


@pytest.mark.parametrize("name", ["a warp takes all heads of a query", "a width that is no multiple of 8"])
def test_samples_far_outside_or_not_finite_count_as_nothing(name):
    value, locations, weights, grad = draw(name, torch.float32)
    for point, number in enumerate((torch.nan, torch.inf, -torch.inf, 1e30)):
        locations[..., point, point % 2] = number
    found = (
        emulated_cuda.forward(value, SHAPES, locations, weights),
        *emulated_cuda.backward(grad, value, SHAPES, locations, weights),
    )
    assert not any(tensor.any() for tensor in found)


def test_borders_and_centres_of_cells_are_read_as_defined():
    steps = torch.tensor([-0.5, -0.25, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 2.75, 3.0, 3.5]) / 3
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    locations = torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2).contiguous()
    value, weights = torch.randn(1, 9, 1, 8), torch.ones(locations.shape[:-1])
    found = emulated_cuda.forward(value, ((3, 3),), locations, weights)
    torch.testing.assert_close(found, reference.forward(value, [3, 3], locations, weights), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rounds", [1, 2, 8])
@pytest.mark.parametrize("heads, channels", [(1, 8), (3, 32), (8, 32), (2, 80)])
def test_every_item_is_taken_once_and_an_encoder_goes_by_tiles(heads, channels, rounds):
    shapes = ((17, 10), (8, 8), (3, 9), (1, 1))
    cells = sum(h * w for h, w in shapes)
    queries = [item // heads for item in emulated_cuda.items_of(shapes, cells, heads, channels, 1, rounds)][::heads]
    tiles, start = [], 0
    for h, w in shapes:
        tiles += [
            cells + start + y * w + x
            for top in range(0, h, 8)
            for left in range(0, w, 8)
            for y in range(top, min(h, top + 8))
            for x in range(left, min(w, left + 8))
        ]
        start += h * w
    assert queries == tiles
    # Other queries stay in their order.
    some = emulated_cuda.items_of(shapes, 37, heads, channels, 2, rounds)
    assert some == list(range(2 * 37 * heads, 3 * 37 * heads))


def test_large_calls_are_planned_with_more_work_per_warp_and_too_large_ones_left_to_the_generic_kernels():
    pyramid = ((100, 167), (50, 84), (25, 42), (13, 21))
    assert emulated_cuda.plan_of(pyramid, 2, 22223, 8, 32, 4) == {
        "lanes": 4,
        "rounds": 4,
        "tiles": True,
        "blocks": 695,
    }
    assert emulated_cuda.plan_of(pyramid, 2, 300, 8, 32, 4) == {"lanes": 4, "rounds": 1, "tiles": False, "blocks": 38}
    assert emulated_cuda.plan_of(pyramid, 65536, 300, 8, 32, 4) is None
    assert emulated_cuda.plan_of(pyramid, 1, 300, 8, 136, 4) is None
    assert emulated_cuda.plan_of(((2**15, 2**14),), 1, 300, 8, 32, 4) is None
    # More than 2^31 elements in all, and in an image.
    assert emulated_cuda.plan_of(((2048, 2048),), 64, 300, 16, 128, 4) is not None


def test_emulated_lanes_that_do_not_meet_are_noticed():
    assert emulated_cuda.compiled(900).split_warp() == 1
