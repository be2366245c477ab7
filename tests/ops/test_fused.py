"""The operator that computes locations and weights, and the layer that uses it, against those that store them."""

import functools
import importlib.util

import pytest
import torch

import ops
from ops import MSDeformAttn, benchmark_layer

SHAPES = ((11, 13), (9, 7), (1, 4), (1, 1))  # 211 cells
NAMES = ("output", "value", "reference points", "offsets", "logits")
# width of a head, queries, heads, levels, points. Few queries for many cells read the tensors in place, many queries
# copy each head, as many as cells go by tiles.
CASES = {
    "few queries": (32, 9, 2, 4, 4),
    "many queries, an odd width": (33, 180, 1, 4, 4),
    "tiles": (8, 211, 2, 4, 4),
    "one level, one point": (16, 9, 3, 1, 1),
    "three levels, seven points": (7, 9, 2, 3, 7),
    "two levels, eight points": (64, 9, 1, 2, 8),
}


@pytest.fixture(params=["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Force each backend in turn; the value is the device to put tensors on."""
    if request.param not in ops.backends():
        pytest.skip(f"backend {request.param} is not available here")
    ops.set_backend(request.param)
    yield torch.device("cuda" if request.param == "cuda" else "cpu")
    ops.set_backend("auto")


@pytest.fixture
def layer_way():
    """Give the choice between the two ways of the layer back."""
    before = ops.selection.fused()
    yield ops.set_fused
    ops.set_fused(before)


def draw(case, numbers, batch=2):
    """Return float64 value, reference points, offsets, logits and a gradient of the output; some samples outside."""
    width, queries, heads, levels, points = CASES[case] if isinstance(case, str) else case
    generator = torch.Generator().manual_seed(queries + numbers)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    cells = sum(h * w for h, w in SHAPES[:levels])
    reference_points = torch.rand(batch, queries, levels, numbers, generator=generator, dtype=torch.float64)
    return (
        normal(batch, cells, heads, width),
        reference_points,
        normal(batch, queries, heads, levels, points, 2) * 2,
        normal(batch, queries, heads, levels, points) * 2,
        normal(batch, queries, heads * width),
    )


def fused(value, shapes, *points):
    return ops.ms_deform_attn_fused(value, shapes, *points)


def stored(value, shapes, *points):
    return ops.ms_deform_attn(value, shapes, *ops.sampling_points(*points, shapes))


def run(way, inputs, dtype, device="cpu"):
    """Return the output and the four gradients."""
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in inputs[:4]]
    output = way(leaves[0], SHAPES[: leaves[1].shape[2]], *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, inputs[4].to(device, output.dtype))


def compare(found, wanted, tolerance):
    for name, ours, theirs in zip(NAMES, found, wanted, strict=True):
        off = (ours.double().cpu() - theirs.double().cpu()).abs().max() / theirs.abs().max().clamp(min=1)
        assert off < tolerance, f"{name} is off by {off:.1e}"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_stored_locations_in_float64(device, case, numbers, dtype, tolerance):
    inputs = draw(case, numbers)
    compare(run(fused, inputs, dtype, device), run(stored, inputs, torch.float64, device), tolerance)


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("case", list(CASES)[:3])
def test_every_instruction_set_gives_the_same(isa, case, numbers):
    inputs = draw(case, numbers)
    compare(run(fused, inputs, torch.float32), run(stored, inputs, torch.float64), 1e-5)


@pytest.mark.parametrize("case", ["few queries", "tiles"])
def test_the_bits_are_the_same_for_any_number_of_threads(isa, case):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(fused, draw(case, 4), torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_and_its_locations_are_float32(device, dtype):
    # Points in bfloat16 and offsets in bfloat16 would meet borders of cells, where the gradient jumps.
    types = (dtype, torch.float32, dtype, dtype, dtype)
    rounded = [tensor.to(kind).double() for tensor, kind in zip(draw("tiles", 2), types, strict=True)]
    leaves = [tensor.to(device, kind).requires_grad_() for tensor, kind in zip(rounded[:4], types)]
    output = ops.ms_deform_attn_fused(leaves[0], SHAPES, *leaves[1:])
    found = (output, *torch.autograd.grad(output, leaves, rounded[4].to(device, dtype)))
    wanted = run(stored, rounded, torch.float64, device)
    for ours, theirs, leaf in zip(found, wanted, [leaves[0], *leaves], strict=True):
        assert ours.dtype == leaf.dtype
        allowed = torch.finfo(leaf.dtype).eps * theirs.abs() + 3e-5 * theirs.abs().max()
        assert ((ours.double() - theirs).abs() <= allowed).all()


@pytest.mark.parametrize("batch, queries", [(0, 3), (2, 0)])
def test_no_images_or_no_queries_give_an_empty_output_and_zero_gradients(device, batch, queries):
    output, *grads = run(fused, draw((8, queries, 2, 4, 3), 4, batch), torch.float32, device)
    assert output.shape == (batch, queries, 16)
    assert not any(grad.any() for grad in grads)


def test_logits_far_apart_and_offsets_that_are_not_finite_leave_the_other_samples_alone(device):
    value, points, offsets, logits, grad = (tensor.clone() for tensor in draw("few queries", 2))
    logits[..., 0] = 200.0  # the others weigh less than the smallest number of float32
    offsets[..., 1, 0] = torch.inf
    offsets[..., 2, 1] = torch.nan
    inputs = (value, points, offsets, logits, grad)
    found = run(fused, inputs, torch.float32, device)
    assert all(tensor.isfinite().all() for tensor in found)
    compare(found, run(stored, inputs, torch.float64, device), 1e-5)


def test_gradients_pass_gradcheck(device):
    value, points, offsets, logits, _ = draw((3, 3, 2, 2, 2), 4, 1)
    inputs = [tensor.to(device).requires_grad_() for tensor in (value, points, offsets, logits)]
    tolerance = 1e-7 if device.type == "cuda" else 0.0  # atomics add in any order
    assert torch.autograd.gradcheck(
        lambda v, *p: ops.ms_deform_attn_fused(v, SHAPES[:2], *p), inputs, nondet_tol=tolerance, fast_mode=True
    )


def test_reference_points_that_need_no_gradient_get_none_and_change_no_other(device):
    inputs = draw("few queries", 4)
    leaves = [tensor.to(device) for tensor in inputs[:4]]
    for i in (0, 2, 3):
        leaves[i].requires_grad_()
    output = ops.ms_deform_attn_fused(leaves[0], SHAPES, *leaves[1:])
    found = torch.autograd.grad(output, [leaves[i] for i in (0, 2, 3)], inputs[4].to(device))
    wanted = run(fused, inputs, torch.float64, device)
    for ours, theirs in zip(found, (wanted[1], *wanted[3:]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_operator_passes_opcheck(device):
    value, points, offsets, logits, grad = (tensor.to(device) for tensor in draw((3, 3, 2, 2, 2), 4, 1))
    flat = [n for pair in SHAPES[:2] for n in pair]
    leaves = [tensor.clone().requires_grad_() for tensor in (value, points, offsets, logits)]
    op = torch.ops.assigndetr
    torch.library.opcheck(op.ms_deform_attn_fused.default, (leaves[0], flat, *leaves[1:]))
    for wants_reference in (False, True):
        arguments = (grad, value, flat, points, offsets, logits, wants_reference)
        torch.library.opcheck(op.ms_deform_attn_fused_backward.default, arguments)


def test_a_second_derivative_is_refused(device):
    inputs = [tensor.to(device).requires_grad_() for tensor in draw((3, 1, 1, 1, 1), 2, 1)[:4]]
    output = ops.ms_deform_attn_fused(inputs[0], SHAPES[:1], *inputs[1:])
    (grad,) = torch.autograd.grad(output.sum(), inputs[3], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def build(width=16, heads=2, points=3):
    torch.manual_seed(0)
    layer = MSDeformAttn(d_model=width, n_levels=4, n_heads=heads, n_points=points)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer


def layer_inputs(numbers, queries=9, width=16):
    generator = torch.Generator().manual_seed(1)
    padding = torch.rand(2, 211, generator=generator) < 0.2
    query, memory = (torch.randn(2, n, width, generator=generator).requires_grad_() for n in (queries, 211))
    return query, torch.rand(2, queries, 4, numbers, generator=generator).requires_grad_(), memory, SHAPES, padding


def pass_through(layer, inputs):
    """Return the output and the gradients of inputs and parameters."""
    output = layer(*inputs)
    leaves = [*inputs[:3], *layer.parameters()]
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


@pytest.mark.parametrize("numbers", [2, 4])
def test_the_layer_gives_the_same_in_both_ways_with_padding(device, layer_way, numbers):
    layer = build().to(device)
    inputs = [t.detach().to(device).requires_grad_() for t in layer_inputs(numbers)[:3]]
    inputs += [SHAPES, layer_inputs(numbers)[4].to(device)]
    results = []
    for on in (True, False):
        layer_way(on)
        results.append(pass_through(layer, inputs))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_under_autocast_the_layer_differs_by_less_than_bfloat16_rounds(device, layer_way):
    layer = build().to(device)
    inputs = [*(t.detach().to(device) for t in layer_inputs(2)[:3]), SHAPES]
    results = []
    for on in (True, False):
        layer_way(on)
        with torch.autocast(device.type, torch.bfloat16):
            results.append(layer(*inputs))
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    torch.testing.assert_close(*results, rtol=2**-6, atol=2**-6)


def test_the_layer_compiles_as_one_graph_in_both_ways(layer_way):
    torch._dynamo.reset()
    ops.set_backend("reference")
    try:
        layer, inputs = build(), layer_inputs(4)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for on in (True, False):
            layer_way(on)
            for ours, eager in zip(pass_through(compiled, inputs), pass_through(layer, inputs), strict=True):
                torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    finally:
        ops.set_backend("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_less_is_kept_for_the_backward_pass_under_autocast_and_never_more(layer_way, dtype):
    reference_points = torch.rand(2, 60, 4, 4)
    case = benchmark_layer.LayerCase(SHAPES, reference_points, dtype, "cpu")
    kept = {}
    for on in (True, False):
        layer_way(on)
        kept[on] = case.kept()
    assert kept[True] <= kept[False] * (0.8 if dtype == torch.bfloat16 else 1)


def loaded_again():
    """Return a second copy of the module that reads the environment when it is loaded."""
    spec = importlib.util.spec_from_file_location("ops._selection_again", ops.selection.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_environment_switches_the_fused_operator_off_and_refuses_other_words(monkeypatch):
    for text, on in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv("ASSIGNDETR_FUSED", text)
        assert loaded_again().fused() is on
    monkeypatch.setenv("ASSIGNDETR_FUSED", "off")
    with pytest.raises(ValueError, match="ASSIGNDETR_FUSED is 'off'; allowed: 0, 1"):
        loaded_again()


def test_wrong_input_is_refused_with_what_was_found():
    value, points, offsets, logits = draw("few queries", 2)[:4]
    with pytest.raises(ValueError, match=r"reference_points must be .* found \(2, 9, 4, 3\)"):
        ops.ms_deform_attn_fused(value, SHAPES, torch.zeros(2, 9, 4, 3).double(), offsets, logits)
    with pytest.raises(ValueError, match=r"offsets must be .* found \(2, 9, 2, 4, 4, 1\)"):
        ops.ms_deform_attn_fused(value, SHAPES, points, offsets[..., :1], logits)
    with pytest.raises(ValueError, match=r"logits must be .* found \(2, 9, 2, 4\)"):
        ops.ms_deform_attn_fused(value, SHAPES, points, offsets, logits[..., 0])
    with pytest.raises(ValueError, match=r"float64 or none.*logits torch.float32"):
        ops.ms_deform_attn_fused(value, SHAPES, points, offsets, logits.float())
