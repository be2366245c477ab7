"""The form of the operator that is written into exported graphs, against the operator itself."""

from __future__ import annotations

import pytest
import torch

import ops
from ops import gather
from tests.ops.test_ms_deform_attn import CASES, draw, expected


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_the_slow_loop(case: str) -> None:
    value, shapes, locations, weights, grad = draw(case)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    with gather.portable():
        output = ops.ms_deform_attn(inputs[0], shapes, *inputs[1:])
    for ours, theirs in zip((output, *torch.autograd.grad(output, inputs, grad)), expected(case), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_samples_on_borders_far_outside_and_not_finite_equal_the_reference() -> None:
    border = [0.0, 1.0, 0.5, 0.25, 1 / 6, -1 / 6, 7 / 6, -0.25, 1.25, 40.0, -1e30, float("nan"), float("inf")]
    points = torch.tensor([(x, y) for x in border for y in border], dtype=torch.float64)
    locations = points.view(1, -1, 1, 1, 1, 2).expand(-1, -1, 2, 2, -1, -1)
    value = torch.randn(1, 3 * 2 + 1, 2, 4, dtype=torch.float64)
    weights = torch.rand(locations.shape[:-1], dtype=torch.float64)
    found = gather.forward(value, [3, 2, 1, 1], locations, weights)
    torch.testing.assert_close(found, ops.reference.forward(value, [3, 2, 1, 1], locations, weights))


def test_half_precision_is_summed_in_float32() -> None:
    value, shapes, locations, weights, _ = (
        t.half() if torch.is_tensor(t) else t for t in draw("width 9, three images")
    )
    with gather.portable():
        found = ops.ms_deform_attn(value, shapes, locations, weights)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, ops.reference.forward(value, [6, 3, 2, 2], locations, weights))


def test_the_form_is_in_force_only_inside_the_block() -> None:
    with pytest.raises(KeyError), gather.portable():
        assert gather.is_portable()
        raise KeyError
    assert not gather.is_portable()
