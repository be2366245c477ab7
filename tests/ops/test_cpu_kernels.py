"""The CPU kernels of every instruction set of this machine against the definition in float64."""

import functools
import math

import pytest
import torch

import ops
from ops import reference
from ops.selection import ISA_VARIABLE

WIDTHS = (1, 7, 8, 16, 24, 32, 33, 64, 100)
# Few queries for many cells read the tensors in place, many queries copy each head, as many as cells go by tiles.
FEW, MANY, TILES = 9, 180, 211
SHAPES = ((11, 13), (9, 7), (1, 4), (1, 1))


@functools.cache
def draw(width, queries, dtype=torch.float32, points=4, heads=2, batch=2):
    """Return value, locations, weights and a gradient of the output: numbers of `dtype`, some samples outside."""
    generator = torch.Generator().manual_seed(width + queries)
    samples = (batch, queries, heads, len(SHAPES), points)
    locations_type = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(batch, sum(h * w for h, w in SHAPES), heads, width, generator=generator, dtype=torch.float64)
    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(samples, generator=generator, dtype=torch.float64)
    grad = torch.randn(batch, queries, heads * width, generator=generator, dtype=torch.float64)
    return value.to(dtype), locations.to(locations_type), weights.to(locations_type), grad.to(dtype)


def flat():
    return [number for pair in SHAPES for number in pair]


def run(value, locations, weights, grad):
    """Return the output and the gradients of value, locations and weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = ops.ms_deform_attn(leaves[0], SHAPES, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def defined(value, locations, weights, grad):
    """Return the same by the reference, in the types of the inputs."""
    output = reference.forward(value, flat(), locations, weights)
    return output, *reference.backward(grad, value, flat(), locations, weights)


@functools.cache
def exact(*case, **keywords):
    """Return the results in float64 and the error of the reference in the type of the case, relative to the largest."""
    inputs = draw(*case)
    wide = defined(*(tensor.double() for tensor in inputs))
    return wide, [error(ours, theirs) for ours, theirs in zip(defined(*inputs), wide, strict=True)]


def error(ours, theirs):
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("queries", [FEW, MANY, TILES], ids=["few", "many", "tiles"])
@pytest.mark.parametrize("width", WIDTHS)
def test_float32_is_as_close_to_the_definition_as_grid_sample(isa, width, queries):
    wide, allowed = exact(width, queries)
    for name, ours, theirs, most in zip(
        "output value locations weights".split(), run(*draw(width, queries)), wide, allowed, strict=True
    ):
        # Twice: both are some last places off, now one more, now the other.
        assert error(ours, theirs) <= 2 * most + 2e-7, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 24, 32, 33])
@pytest.mark.parametrize("queries", [FEW, TILES], ids=["few", "tiles"])
def test_other_types_are_rounded_once(isa, width, queries, dtype):
    inputs = draw(width, queries, dtype)
    wide, _ = exact(width, queries, dtype)
    for ours, theirs, given in zip(run(*inputs), wide, (inputs[0], *inputs[:3]), strict=True):
        assert ours.dtype == given.dtype
        sums = 1e-13 if dtype == torch.float64 else 1e-5
        allowed = torch.finfo(given.dtype).eps * theirs.abs() + sums * theirs.abs().max()
        assert ((ours.double() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("points", [1, 3, 5])
def test_any_number_of_points_fills_vectors_and_remainders(isa, points):
    case = (16, MANY, torch.float32, points)
    wide, allowed = exact(*case)
    for ours, theirs, most in zip(run(*draw(*case)), wide, allowed, strict=True):
        assert error(ours, theirs) <= 2 * most + 2e-7


@pytest.mark.parametrize("queries", [FEW, TILES], ids=["few", "tiles"])
@pytest.mark.parametrize("width", [32, 33])
def test_the_bits_are_the_same_for_any_number_of_threads(isa, width, queries):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(*draw(width, queries, heads=3)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("queries", [FEW, TILES], ids=["few", "tiles"])
def test_samples_that_are_not_finite_or_far_outside_count_as_nothing(isa, queries):
    value, locations, weights, grad = draw(32, queries)
    bad = locations.clone()
    for point, number in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        bad[..., point, point % 2] = number
    # Nothing is read for them either: what is not finite in a cell would spread.
    output, *grads = run(torch.full_like(value, math.nan), bad, weights, grad)
    assert not output.any() and not any(tensor.any() for tensor in grads)


def test_a_sample_that_is_not_finite_leaves_the_others_alone(isa):
    value, locations, weights, grad = draw(32, MANY)
    bad, none = locations.clone(), weights.clone()
    bad[:, :, :, :, 1] = math.nan
    none[:, :, :, :, 1] = 0
    found, wanted = run(value, bad, weights, grad), run(value, locations, none, grad)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert not found[2][:, :, :, :, 1].any() and not found[3][:, :, :, :, 1].any()
    rest = [0, 2, 3]
    assert torch.equal(found[2][:, :, :, :, rest], wanted[2][:, :, :, :, rest])
    assert torch.equal(found[3][:, :, :, :, rest], wanted[3][:, :, :, :, rest])


@pytest.mark.parametrize("batch, queries", [(0, 3), (2, 0), (0, 0)])
def test_no_images_or_no_queries_give_empty_outputs_and_zero_gradients(isa, batch, queries):
    inputs = draw(32, queries, batch=batch)
    output, *grads = run(*inputs)
    assert output.shape == (batch, queries, 64)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs[:3]]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("queries", [2, 14], ids=["in place", "copied"])
def test_gradients_pass_gradcheck(isa, queries):
    shapes = ((4, 3), (1, 2))
    generator = torch.Generator().manual_seed(5)
    value = torch.randn(2, 14, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(2, queries, 2, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, queries, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    inputs = (value, locations.requires_grad_(), weights)
    assert torch.autograd.gradcheck(lambda v, p, a: ops.ms_deform_attn(v, shapes, p, a), inputs, fast_mode=True)


def test_many_levels_are_counted_right(isa):
    shapes = tuple((1 + level % 3, 1 + level % 5) for level in range(128))
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(1, sum(h * w for h, w in shapes), 2, 8, generator=generator)
    locations = torch.rand(1, 5, 2, 128, 1, 2, generator=generator)
    weights = torch.rand(1, 5, 2, 128, 1, generator=generator)
    numbers = [number for pair in shapes for number in pair]
    wide = reference.forward(value.double(), numbers, locations.double(), weights.double())
    assert error(ops.ms_deform_attn(value, shapes, locations, weights), wide) < 2e-6


def test_an_instruction_set_that_is_not_there_is_refused_with_those_that_are(isa, monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match=f"{ISA_VARIABLE} is 'mmx'; this machine has .*portable"):
        run(*draw(8, FEW))
