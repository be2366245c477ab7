"""The operator against its definition, on every backend this machine has."""

import functools
import math

import numpy as np
import pytest
import torch

import ops

# name -> images, queries, heads, width of a head, level shapes, points
CASES = {
    "one of everything": (1, 1, 1, 1, ((1, 1),), 1),
    "width 3, flat and narrow levels": (2, 5, 3, 3, ((3, 5), (1, 4), (2, 1)), 2),
    "width 32, four levels": (2, 4, 2, 32, ((7, 5), (4, 3), (2, 2), (1, 1)), 4),
    "width 40, five levels, seven points": (1, 3, 2, 40, ((5, 6), (4, 4), (3, 2), (2, 3), (1, 1)), 7),
    "width 9, three images": (3, 7, 1, 9, ((6, 3), (2, 2)), 3),
}
SUMS = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Force each backend in turn; the value is the device to put tensors on."""
    if request.param not in ops.backends():
        reason = "no GPU, or no nvcc that fits PyTorch" if request.param == "cuda" else "no C++ compiler or no ninja"
        pytest.skip(f"backend {request.param} is not available here: {reason}")
    ops.set_backend(request.param)
    yield torch.device("cuda" if request.param == "cuda" else "cpu")
    ops.set_backend("auto")


def slow(value, level_shapes, locations, weights):
    """Equation (3) of Deformable DETR, one sample and one neighbour at a time; differentiable."""
    batch, _, heads, width = value.shape
    rows = []
    for b in range(batch):
        for q in range(locations.shape[1]):
            for m in range(heads):
                total, start = value.new_zeros(width), 0
                for level, (h, w) in enumerate(level_shapes):
                    for p in range(locations.shape[4]):
                        # Cell centres are at half integers of a map w wide.
                        x = locations[b, q, m, level, p, 0] * w - 0.5
                        y = locations[b, q, m, level, p, 1] * h - 0.5
                        for row in (int(y.detach().floor()), int(y.detach().floor()) + 1):
                            for column in (int(x.detach().floor()), int(x.detach().floor()) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    near = (1 - (x - column).abs()) * (1 - (y - row).abs())
                                    cell = value[b, start + row * w + column, m]
                                    total = total + weights[b, q, m, level, p] * near * cell
                    start += h * w
                rows.append(total)
    return torch.stack(rows).view(batch, -1, heads * width)


def draw(case, outside=0.3, seed=0):
    """Return float64 value, level shapes, locations, weights and a gradient of the output."""
    batch, queries, heads, width, shapes, points = CASES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(seed)
    cells = sum(h * w for h, w in shapes)
    samples = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, cells, heads, width, generator=generator, dtype=torch.float64)
    locations = torch.rand(*samples, 2, generator=generator, dtype=torch.float64) * (1 + 2 * outside) - outside
    weights = torch.rand(samples, generator=generator, dtype=torch.float64)
    grad = torch.randn(batch, queries, heads * width, generator=generator, dtype=torch.float64)
    return value, shapes, locations, weights, grad


@functools.cache
def expected(case):
    """Return output and the three gradients of the slow loop."""
    value, shapes, locations, weights, grad = draw(case)
    inputs = [t.requires_grad_() for t in (value, locations, weights)]
    output = slow(inputs[0], shapes, *inputs[1:])
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


def run(case_inputs, device, dtypes):
    """Return the operator's output and gradients; `dtypes` are those of value, locations and weights."""
    value, shapes, locations, weights, grad = case_inputs
    inputs = [
        t.detach().to(device, dtype).requires_grad_()
        for t, dtype in zip((value, locations, weights), dtypes, strict=True)
    ]
    output = ops.ms_deform_attn(inputs[0], shapes, *inputs[1:])
    return output, *torch.autograd.grad(output, inputs, grad.to(device, output.dtype))


def test_a_sample_at_a_cell_centre_reads_that_cell_and_between_cells_the_mean(device):
    value = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).view(1, 4, 1, 1)
    points = {
        (0.25, 0.25): 1.0,
        (0.75, 0.25): 2.0,
        (0.25, 0.75): 3.0,
        (0.5, 0.5): 2.5,
        (0.0, 0.0): 0.25,
        (-0.3, 0.5): 0,
    }
    locations = torch.tensor(list(points), device=device).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(1, len(points), 1, 1, 1, device=device)
    output = ops.ms_deform_attn(value, [(2, 2)], locations, weights)
    torch.testing.assert_close(output.flatten().cpu(), torch.tensor(list(points.values())))


def test_x_runs_along_the_width_and_levels_follow_each_other(device):
    # Level 0 is 1 high and 3 wide: cells 0 1 2; level 1 is 2 high and 1 wide: cells 10 20.
    value = torch.tensor([0.0, 1.0, 2.0, 10.0, 20.0], device=device).view(1, 5, 1, 1)
    locations = torch.tensor([[5 / 6, 0.5], [0.5, 0.75]], device=device).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([1.0, 0.5], device=device).view(1, 1, 1, 2, 1)
    assert ops.ms_deform_attn(value, [(1, 3), (2, 1)], locations, weights).item() == pytest.approx(2 + 0.5 * 20)


def test_heads_stand_one_after_the_other_in_the_output(device):
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device).view(1, 1, 2, 2)
    locations = torch.full((1, 1, 2, 1, 1, 2), 0.5, device=device)
    output = ops.ms_deform_attn(value, [(1, 1)], locations, torch.ones(1, 1, 2, 1, 1, device=device))
    assert output.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("dtype", SUMS)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_slow_loop(device, case, dtype):
    found = run(draw(case), device, (dtype,) * 3)
    for name, ours, theirs in zip(("output", "value", "locations", "weights"), found, expected(case), strict=True):
        assert ours.dtype == dtype
        error = (ours.double().cpu() - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        assert error < SUMS[dtype], f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("others", ["float32", "half"])
def test_half_precision_is_summed_in_float32(device, dtype, others):
    case = CASES["width 32, four levels"]
    value, shapes, locations, weights, grad = draw(case)
    rounded = (value.to(dtype), locations.float(), weights.float(), grad.to(dtype))
    if others == "half":
        rounded = tuple(t.to(dtype) for t in rounded)
    value, locations, weights, grad = (t.double() for t in rounded)
    inputs = (value, shapes, locations, weights, grad)
    exact = run(inputs, device, (torch.float64,) * 3)
    found = run(inputs, device, [t.dtype for t in rounded[:3]])
    for ours, theirs, kept in zip(found, exact, (dtype, *(t.dtype for t in rounded[:3])), strict=True):
        assert ours.dtype == kept
        # One rounding of the result is all that half precision may cost.
        allowed = torch.finfo(kept).eps * theirs.abs() + 3e-5 * theirs.abs().max()
        assert ((ours.double() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("images, queries", [(0, 3), (2, 0), (0, 0)])
def test_no_images_or_no_queries_give_an_empty_output_and_zero_gradients(device, images, queries):
    output, *grads = run(draw((images, queries, 2, 4, ((2, 3), (1, 1)), 2)), device, (torch.float32,) * 3)
    assert output.shape == (images, queries, 8)
    assert all(not grad.any() for grad in grads)


def test_a_sample_outside_or_not_finite_contributes_nothing(device):
    value, shapes, locations, weights, grad = draw("width 3, flat and narrow levels")
    locations[:, :, :, :, 0] = torch.tensor([math.inf, -math.inf])
    locations[:, :, :, :, 1] = math.nan
    output, *grads = run((value, shapes, locations, weights, grad), device, (torch.float64,) * 3)
    assert not output.any() and not any(g.any() for g in grads)


def test_strided_inputs_give_the_same_as_contiguous_ones(device):
    value, shapes, locations, weights, grad = draw("width 3, flat and narrow levels")
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        shapes,
        locations.flip(-1).contiguous().flip(-1).transpose(0, 1).contiguous().transpose(0, 1),
        weights.repeat_interleave(2, dim=-1)[..., ::2],
        grad[:, :1].expand(-1, 5, -1),
    )
    straight = (*draw("width 3, flat and narrow levels")[:4], strided[4].contiguous())
    assert not any(strided[i].is_contiguous() for i in (0, 2, 3, 4))
    for ours, theirs in zip(
        run(strided, device, (torch.float64,) * 3), run(straight, device, (torch.float64,) * 3), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_flat_level_shapes_mean_the_same_as_pairs(device):
    value, shapes, locations, weights, _ = draw("width 9, three images")
    value, locations, weights = (t.to(device) for t in (value, locations, weights))
    flat = [n for pair in shapes for n in pair]
    pairs = ops.ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(ops.ms_deform_attn(value, flat, locations, weights), pairs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensor", "array"])
def test_level_shapes_may_be_an_integer_tensor_or_array_on_the_cpu(device, kind):
    value, shapes, locations, weights, _ = draw("width 9, three images")
    value, locations, weights = (t.to(device) for t in (value, locations, weights))
    pairs = ops.ms_deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(ops.ms_deform_attn(value, kind(shapes), locations, weights), pairs, rtol=0, atol=0)


def test_gradients_pass_gradcheck(device):
    value, shapes, locations, weights, _ = draw((2, 3, 2, 3, ((4, 3), (1, 2)), 2), outside=0.2, seed=3)
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    tolerance = 1e-7 if device.type == "cuda" else 0.0  # atomics add in any order
    assert torch.autograd.gradcheck(
        lambda v, p, a: ops.ms_deform_attn(v, shapes, p, a), inputs, nondet_tol=tolerance, fast_mode=False
    )


def test_a_second_derivative_is_refused(device):
    value, shapes, locations, weights, _ = draw((1, 1, 1, 2, ((2, 2),), 1))
    value, locations, weights = (t.to(device).requires_grad_() for t in (value, locations, weights))
    output = ops.ms_deform_attn(value, shapes, locations, weights)
    (grad,) = torch.autograd.grad(output.sum(), weights, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_only_the_gradients_asked_for_are_returned(device):
    value, shapes, locations, weights, _ = draw((1, 2, 1, 2, ((2, 2),), 1))
    value, locations, weights = value.to(device).requires_grad_(), locations.to(device), weights.to(device)
    ops.ms_deform_attn(value, shapes, locations, weights).sum().backward()
    assert value.grad is not None and locations.grad is None and weights.grad is None


def test_the_operator_passes_opcheck(device):
    value, shapes, locations, weights, grad = draw((2, 3, 2, 3, ((4, 3), (1, 2)), 2))
    flat = [n for pair in shapes for n in pair]
    tensors = [t.to(device) for t in (value, locations, weights)]
    leaves = [t.clone().requires_grad_() for t in tensors]
    forward, backward = (
        torch.ops.assigndetr.ms_deform_attn.default,
        torch.ops.assigndetr.ms_deform_attn_backward.default,
    )
    torch.library.opcheck(forward, (leaves[0], flat, *leaves[1:]))
    torch.library.opcheck(backward, (grad.to(device), tensors[0], flat, *tensors[1:]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_full_graph_compiles_and_gives_the_same(device, dynamic):
    torch._dynamo.reset()
    value, shapes, locations, weights, grad = draw("width 3, flat and narrow levels")

    def attend(value, locations, weights):
        return ops.ms_deform_attn(value * 2, shapes, locations, weights.softmax(-1)) + 1

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = [t.to(device).requires_grad_() for t in (value, locations, weights)]
    results = []
    for function in (attend, compiled):
        output = function(*inputs)
        results.append((output, *torch.autograd.grad(output, inputs, grad.to(device))))
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


def test_a_compiled_graph_follows_a_change_of_backend(device):
    torch._dynamo.reset()
    value, shapes, locations, weights, _ = (
        t if isinstance(t, tuple) else t.to(device) for t in draw("width 3, flat and narrow levels")
    )
    compiled = torch.compile(ops.ms_deform_attn, fullgraph=True, backend="aot_eager")
    first = compiled(value, shapes, locations, weights)
    ops.set_backend("reference")
    torch.testing.assert_close(compiled(value, shapes, locations, weights), first)


def test_autocast_computes_in_float32_and_returns_gradients_in_the_types_of_the_inputs(device):
    value, shapes, locations, weights, grad = draw("width 32, four levels")
    types = (torch.bfloat16, torch.float32, torch.bfloat16)
    rounded = [t.to(dtype).double() for t, dtype in zip((value, locations, weights), types, strict=True)]
    grad = grad.float().double()
    exact = run((rounded[0], shapes, *rounded[1:], grad), device, (torch.float64,) * 3)
    with torch.autocast(device.type, torch.bfloat16):
        found = run((rounded[0], shapes, *rounded[1:], grad), device, types)
    assert [t.dtype for t in found] == [torch.float32, *types]
    for ours, theirs, eps in zip(found, exact, (1e-6, 2**-8, 1e-6, 2**-8), strict=True):
        assert ((ours.double() - theirs).abs() <= eps * theirs.abs() + 1e-5 * theirs.abs().max()).all()


def test_the_cpu_kernel_gives_the_same_bits_for_any_number_of_threads():
    if "cpu" not in ops.backends():
        pytest.skip("backend cpu is not available here: no C++ compiler or no ninja")
    threads = torch.get_num_threads()
    inputs = draw((2, 300, 4, 8, ((12, 9), (6, 5)), 4))
    try:
        ops.set_backend("cpu")
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(inputs, "cpu", (torch.float32,) * 3))
    finally:
        torch.set_num_threads(threads)
        ops.set_backend("auto")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


WRONG = {
    "value has 3 dimensions": ({"value": torch.zeros(2, 6, 4)}, r"value must be \(B, S, heads, D / heads\)"),
    "weights have 4 dimensions": ({"weights": torch.zeros(2, 3, 2, 2)}, r"weights must be \(B, Q, heads, levels"),
    "integer value": (
        {"value": torch.zeros(2, 6, 2, 2, dtype=torch.int64)},
        r"value is torch.int64; allowed: float16",
    ),
    "float64 mixed with float32": (
        {"value": torch.zeros(2, 6, 2, 2).double()},
        r"float64 or none.*value torch.float64",
    ),
    "wrong number of cells": ({"shapes": [(2, 3)]}, r"\[2, 3\] count 6 cells, but value has 7"),
    "a level without cells": ({"shapes": [(2, 3), (0, 1)]}, r"positive integers, found \[2, 3, 0, 1\]"),
    "an odd count of numbers": ({"shapes": [2, 3, 1]}, r"pairs \(h, w\)"),
    "no levels": ({"shapes": []}, r"1 to 128 pairs"),
    "a tensor of shapes off the CPU": (
        {"shapes": torch.zeros(2, 2, dtype=torch.int64, device="meta")},
        r"a tensor on the CPU, found one on meta",
    ),
    "a tensor of fractional shapes": ({"shapes": torch.tensor([[2.0, 3.0], [1.0, 1.0]])}, r"Python integers, found"),
    "fractional shapes": ({"shapes": [(2.0, 3.0), (1, 1)]}, r"Python integers, found \[\(2.0, 3.0\)"),
    "weights of another level count": (
        {"weights": torch.zeros(2, 3, 2, 3, 1)},
        r"\(2, 3, 2, 2, 1\).*\(2, 3, 2, 3, 1\)",
    ),
    "locations of other queries": (
        {"locations": torch.zeros(2, 4, 2, 2, 1, 2)},
        r"locations must be.*\(2, 4, 2, 2, 1, 2\)",
    ),
    "two devices": ({"locations": torch.zeros(2, 3, 2, 2, 1, 2, device="meta")}, r"one device.*locations on meta"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_with_what_was_found(wrong):
    inputs = {
        "value": torch.zeros(2, 7, 2, 2),
        "shapes": [(2, 3), (1, 1)],
        "locations": torch.zeros(2, 3, 2, 2, 1, 2),
        "weights": torch.zeros(2, 3, 2, 2, 1),
    }
    ops.ms_deform_attn(inputs["value"], inputs["shapes"], inputs["locations"], inputs["weights"])
    change, message = WRONG[wrong]
    inputs |= change
    with pytest.raises(ValueError, match=message):
        ops.ms_deform_attn(inputs["value"], inputs["shapes"], inputs["locations"], inputs["weights"])
