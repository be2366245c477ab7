"""The CUDA kernels on a GPU. What they compute is also tested without one: test_cuda_emulated.py."""

import pytest
import torch

import ops
from ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

PYRAMID = ((20, 31), (10, 16), (5, 8), (3, 4))
LEVELS = {1: PYRAMID[:1], 4: PYRAMID, 5: (*PYRAMID, (2, 2))}
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIDTHS = (3, 8, 16, 20, 24, 32, 40, 64, 80, 128, 136)


@pytest.fixture(autouse=True)
def kernel():
    if "cuda" not in ops.backends():
        pytest.skip("no nvcc that fits PyTorch")
    ops.set_backend("cuda")
    yield
    ops.set_backend("auto")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def away_from_borders(locations, shapes):
    """Move locations at least a hundredth of a cell away from where the cells they lie between change.

    Their gradients jump there. Of the 1.7 million samples of the largest test about one would come out on the other
    side in float32, with a gradient that has nothing to do with the definition's.
    """
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float64, device=locations.device)[:, None]
    places = locations.double() * sizes - 0.5
    first = places.floor()
    return (first + 0.01 + 0.98 * (places - first) + 0.5) / sizes


def draw(dtype, width=32, levels=4, points=4, batch=2, queries=300, heads=8):
    """Return value, shapes, locations, weights and a gradient of the output, on the GPU. `queries` None: the cells."""
    shapes = LEVELS[levels]
    cells = sum(h * w for h, w in shapes)
    queries = cells if queries is None else queries
    sums = reference.compute_dtype(dtype)
    samples = (batch, queries, heads, levels, points)
    value = torch.randn(batch, cells, heads, width, device="cuda").to(dtype)
    locations = away_from_borders(torch.rand(*samples, 2, device="cuda") * 1.4 - 0.2, shapes).to(sums)
    weights = torch.rand(samples, device="cuda").to(sums)
    return value, shapes, locations, weights, torch.randn(batch, queries, heads * width, device="cuda").to(dtype)


def run(value, shapes, locations, weights, grad):
    """Return the output and the gradients of value, locations and weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = ops.ms_deform_attn(leaves[0], shapes, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def check(inputs):
    """Compare with the definition in float64, on the CPU: each number may be rounded once to its type."""
    value, shapes, locations, weights, grad = inputs
    flat = [number for pair in shapes for number in pair]
    wide = [tensor.double().cpu() for tensor in (value, locations, weights, grad)]
    wanted = (
        reference.forward(wide[0], flat, *wide[1:3]),
        *reference.backward(wide[3], wide[0], flat, *wide[1:3]),
    )
    for name, ours, theirs in zip("output value locations weights".split(), run(*inputs), wanted, strict=True):
        sums = 1e-12 if value.dtype == torch.float64 else 1e-5
        rounding = torch.finfo(ours.dtype).eps if ours.dtype in (torch.float16, torch.bfloat16) else 0
        allowed = rounding * theirs.abs() + sums * theirs.abs().max()
        assert ((ours.double().cpu() - theirs).abs() <= allowed).all(), name


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_of_a_head_gives_the_definition(dtype, width):
    check(draw(dtype, width, heads=3))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("points", [1, 4, 7, 8])
@pytest.mark.parametrize("levels", LEVELS)
def test_every_number_of_levels_and_points_gives_the_definition(dtype, levels, points):
    check(draw(dtype, levels=levels, points=points))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("queries", [1, 301, None], ids=["one", "decoder", "encoder"])
def test_every_number_of_images_and_queries_gives_the_definition(dtype, batch, queries):
    check(draw(dtype, batch=batch, queries=queries))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [8, 20, 24, 32, 128])
def test_deterministic_gradients_are_the_definition_too(deterministic, dtype, width):
    check(draw(dtype, width))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [20, 32])
def test_deterministic_gradients_are_the_same_bits_in_twenty_runs(deterministic, dtype, width):
    inputs = draw(dtype, width, queries=None)
    first = run(*inputs)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run(*inputs), first, strict=True))


def test_a_gradient_that_is_not_finite_shows_in_the_deterministic_sums(deterministic):
    *inputs, grad = draw(torch.float32)
    grad[0, 0, 0] = torch.inf
    assert run(*inputs, grad)[1].isnan().all()


@pytest.mark.parametrize("fixed", [False, True], ids=["plain sums", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_can_be_recorded_as_a_graph(request, dtype, fixed):
    if fixed:
        request.getfixturevalue("deterministic")
    inputs = draw(dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(*inputs)
    other = draw(dtype)
    for old, new in zip(inputs, other, strict=True):
        if isinstance(old, torch.Tensor):  # the shapes stay
            old.copy_(new)
    graph.replay()
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (1e-2, 2e-2)  # sums in another order may round elsewhere
    for ours, theirs in zip(recorded, run(*other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_neither_pass_waits_for_the_gpu(deterministic):
    inputs = draw(torch.bfloat16)
    run(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tensors_that_begin_anywhere_in_memory_are_computed():
    value, shapes, locations, weights, grad = draw(torch.float16)
    shifted = torch.empty(value.numel() + 1, dtype=value.dtype, device="cuda")[1:].view(value.shape).copy_(value)
    for ours, theirs in zip(
        run(shifted, shapes, locations, weights, grad), run(value, shapes, locations, weights, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-3)


def test_values_of_more_than_two_to_the_31_elements_are_addressed_right():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GB of free GPU memory")
    batch, shapes = 66, ((512, 256),)
    value = torch.zeros(batch, 512 * 256, 8, 32, dtype=torch.bfloat16, device="cuda").requires_grad_()
    assert value.numel() > 2**31
    with torch.no_grad():
        value[-1, -1] = 1
    locations = torch.full((batch, 1, 8, 1, 1, 2), 1.0, device="cuda") - torch.tensor([0.5 / 256, 0.5 / 512]).cuda()
    output = ops.ms_deform_attn(value, shapes, locations, torch.ones(batch, 1, 8, 1, 1, device="cuda"))
    assert output[-1].eq(1).all() and not output[:-1].any()
    output.backward(torch.ones_like(output))
    assert value.grad[:, -1].eq(1).all() and value.grad[0, 0].eq(0).all()


def draw_fused(dtype, numbers):
    """Return value, shapes, reference points, offsets, logits and a gradient of the output, on the GPU."""
    value, shapes, locations, weights, grad = draw(dtype, queries=None)
    points = torch.rand(*weights.shape[:2], len(shapes), numbers, device="cuda").to(weights.dtype)
    offsets, logits = (torch.randn(tensor.shape, device="cuda").to(dtype) for tensor in (locations, weights))
    return value, shapes, points, offsets, logits, grad


def run_fused(value, shapes, points, offsets, logits, grad):
    """Return the output and the four gradients of the fused operator."""
    leaves = [tensor.detach().requires_grad_() for tensor in (value, points, offsets, logits)]
    output = ops.ms_deform_attn_fused(leaves[0], shapes, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_fused_operator_gives_the_same_bits_in_twenty_deterministic_runs(deterministic, dtype, numbers):
    inputs = draw_fused(dtype, numbers)
    first = run_fused(*inputs)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(run_fused(*inputs), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_operator_waits_for_nothing_and_can_be_recorded_as_a_graph(deterministic, dtype):
    inputs = draw_fused(dtype, 4)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_fused(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_fused(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run_fused(*inputs)
    other = draw_fused(dtype, 4)
    for old, new in zip(inputs, other, strict=True):
        if isinstance(old, torch.Tensor):  # the shapes stay
            old.copy_(new)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(recorded, run_fused(*other), strict=True))
