"""The attention layer: initial values, reference points, padding, precision."""

import math

import pytest
import torch

import ops
from ops import MSDeformAttn

SHAPES = ((4, 6), (2, 3))
CELLS = 30


@pytest.fixture(autouse=True)
def reference_backend():
    ops.set_backend("reference")
    before = ops.selection.fused()
    yield
    ops.set_backend("auto")
    ops.set_fused(before)


def build(seed=0, **keywords):
    torch.manual_seed(seed)
    settings = {"d_model": 8, "n_levels": 2, "n_heads": 2, "n_points": 3} | keywords
    layer = MSDeformAttn(**settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


def draw(queries=5, numbers=2, batch=2):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, queries, 8, generator=generator)
    reference = torch.rand(batch, queries, 2, numbers, generator=generator)
    return query, reference, torch.randn(batch, CELLS, 8, generator=generator)


def by_hand(layer, query, reference, memory, padding=None):
    """The layer of section 4.1 written with loops over heads, levels and points."""
    batch, queries, width = query.shape
    heads, levels, points = layer.n_heads, layer.n_levels, layer.n_points
    value = layer.value_proj(memory)
    if padding is not None:
        value = value * (~padding)[..., None]
    offsets = layer.sampling_offsets(query).view(batch, queries, heads, levels, points, 2)
    weights = layer.attention_weights(query).view(batch, queries, heads, levels * points).softmax(-1)
    locations = torch.empty(batch, queries, heads, levels, points, 2)
    for level, (h, w) in enumerate(SHAPES):
        for head in range(heads):
            for point in range(points):
                x, y = reference[:, :, level, 0], reference[:, :, level, 1]
                dx, dy = offsets[:, :, head, level, point].unbind(-1)
                if reference.shape[-1] == 2:
                    x, y = x + dx / w, y + dy / h
                else:
                    x = x + dx / points * reference[:, :, level, 2] / 2
                    y = y + dy / points * reference[:, :, level, 3] / 2
                locations[:, :, head, level, point] = torch.stack((x, y), -1)
    value = value.view(batch, CELLS, heads, width // heads)
    weights = weights.view(batch, queries, heads, levels, points)
    return layer.output_proj(ops.ms_deform_attn(value, SHAPES, locations, weights))


def test_a_fresh_layer_looks_at_rings_around_the_reference_with_equal_weights():
    layer = MSDeformAttn(d_model=16, n_levels=3, n_heads=8, n_points=2)
    bias = layer.sampling_offsets.bias.detach().view(8, 3, 2, 2)
    # On a square, not on a circle: (1, 1), not (0.7, 0.7).
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(directions):
        for level in range(3):
            torch.testing.assert_close(bias[head, level, 0], torch.tensor([float(x), float(y)]), atol=1e-5, rtol=0)
            torch.testing.assert_close(bias[head, level, 1], torch.tensor([2.0 * x, 2.0 * y]), atol=1e-5, rtol=0)
    for zero in (layer.sampling_offsets.weight, layer.attention_weights.weight, layer.attention_weights.bias):
        assert not zero.any()
    for projection in (layer.value_proj, layer.output_proj):
        assert not projection.bias.any()
        assert projection.weight.abs().max() <= math.sqrt(6 / 32)
        assert projection.weight.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.2)


def test_reset_parameters_restores_the_initial_offsets():
    layer = MSDeformAttn(d_model=8, n_levels=1, n_heads=4, n_points=2)
    before = layer.sampling_offsets.bias.detach().clone()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(3.0)
    layer.reset_parameters()
    assert torch.equal(layer.sampling_offsets.bias, before)
    assert not layer.sampling_offsets.weight.any() and not layer.value_proj.bias.any()


def test_parameters_are_named_and_ordered_as_in_published_checkpoints():
    names = [name for name, _ in MSDeformAttn().named_parameters()]
    layers = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_equals_its_definition_written_with_loops(numbers, padded):
    layer, (query, reference, memory) = build(), draw(numbers=numbers)
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[0, 20:] = padded
    found = layer(query, reference, memory, SHAPES, padding if padded else None)
    torch.testing.assert_close(found, by_hand(layer, query, reference, memory, padding))


def test_padded_cells_do_not_matter_whatever_they_hold():
    layer, (query, reference, memory) = build(), draw()
    padding = torch.zeros(2, CELLS, dtype=torch.bool)
    padding[:, ::3] = True
    first = layer(query, reference, memory, SHAPES, padding)
    second = layer(query, reference, memory.masked_fill(padding[..., None], 1e4), SHAPES, padding)
    assert torch.equal(first, second)


def test_an_offset_of_one_moves_by_one_cell_of_each_level():
    reference = torch.tensor([0.5, 0.5]).expand(1, 1, 2, 2)
    offsets, logits = torch.ones(1, 1, 1, 2, 1, 2), torch.zeros(1, 1, 1, 2, 1)
    locations, _ = ops.sampling_points(reference, offsets, logits, SHAPES)
    expected = torch.tensor([[0.5 + 1 / 6, 0.5 + 1 / 4], [0.5 + 1 / 3, 0.5 + 1 / 2]])
    torch.testing.assert_close(locations.view(2, 2), expected)


def test_gradients_reach_every_parameter_and_input():
    layer, inputs = build(), [t.requires_grad_() for t in draw()]
    layer(*inputs, SHAPES).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in (*inputs, *layer.parameters()))


def test_under_autocast_the_sampling_stays_in_float32(monkeypatch):
    seen = {}

    def spy(value, shapes, locations, weights):
        seen.update(locations=locations.dtype, weights=weights.dtype)
        return ops.ms_deform_attn(value, shapes, locations, weights)

    layer, (query, reference, memory) = build(), draw()
    monkeypatch.setitem(MSDeformAttn.forward.__globals__, "ms_deform_attn", spy)
    ops.set_fused(False)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(query, reference, memory, SHAPES)
    assert seen == {"locations": torch.float32, "weights": torch.float32}
    assert output.dtype == torch.bfloat16
    exact = layer(query, reference, memory, SHAPES)
    assert (output - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_cast_to_another_type_returns_that_type(dtype):
    layer, inputs = build().to(dtype), [t.to(dtype) for t in draw()]
    assert layer(*inputs, SHAPES).dtype == dtype


def test_the_layer_compiles_as_one_graph():
    torch._dynamo.reset()
    layer, inputs = build(), draw(numbers=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, SHAPES), layer(*inputs, SHAPES))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="d_model=10 and n_heads=4"):
        MSDeformAttn(d_model=10, n_heads=4)
    with pytest.raises(ValueError, match="n_points=0"):
        MSDeformAttn(n_points=0)


def test_wrong_shapes_are_refused_with_what_was_found():
    layer, (query, reference, memory) = build(), draw()
    with pytest.raises(ValueError, match="reads 2 levels, found 1"):
        layer(query, reference, memory, SHAPES[:1])
    with pytest.raises(ValueError, match=r"reference must be .* found \(2, 5, 2, 3\)"):
        layer(query, torch.rand(2, 5, 2, 3), memory, SHAPES)
    with pytest.raises(ValueError, match=r"reference must be .* found \(2, 4, 2, 2\)"):
        layer(query, reference[:, :4], memory, SHAPES)
    with pytest.raises(ValueError, match=r"padding must be bool .* found torch.float32"):
        layer(query, reference, memory, SHAPES, torch.zeros(2, CELLS))
