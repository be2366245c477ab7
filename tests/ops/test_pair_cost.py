"""The matching costs from compiled code: by hand, against their definition, and as the CUDA kernel has them."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor

from models.assign import HungarianMatcher
from models.assign.costs import ALPHA, EPS, class_cost
from ops import set_backend
from ops.pair_cost import pair_costs, pair_costs_ready
from tests.ops import emulated_cuda
from tests.tiny import make_target
from util.boxes import cxcywh_to_xyxy, paired_giou
from util.structures import FlatTargets, Predictions

HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None
WEIGHTS = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
no_coroutines = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without coroutines in C")
WAYS = [pytest.param(pair_costs, id="cpu"), pytest.param(emulated_cuda.pair_costs, id="cuda", marks=no_coroutines)]
both = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    assert pair_costs_ready(torch.device("cpu"))


def draw(layers: int = 2, batch: int = 3, slots: int = 37, classes: int = 5, targets: int = 4, scale: float = 3.0):
    generator = torch.Generator().manual_seed(slots)
    logits = scale * torch.randn(layers, batch, slots, classes, generator=generator)
    boxes = torch.rand(layers, batch, slots, 4, generator=generator)
    labels = torch.randint(classes, (targets,), generator=generator)
    own = torch.rand(targets, 4, generator=generator)
    return logits, boxes, labels, own, torch.randint(batch, (targets,), generator=generator)


def defined(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, image: Tensor, eps: float = 0.0) -> Tensor:
    """Return the costs as the papers write them, in the type of the tensors."""
    p = logits[:, image, :, labels].sigmoid()
    classes = ALPHA * (1 - p) ** 2 * -(p + EPS).log() - (1 - ALPHA) * p**2 * -(1 - p + EPS).log()
    boxes, targets = boxes[:, image].transpose(0, 1), targets[:, None, None]
    giou = paired_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets), eps)
    return 2 * classes + 5 * (boxes - targets).abs().sum(-1) - 2 * giou


def in_float64(inputs: tuple[Tensor, ...], eps: float = 0.0) -> Tensor:
    return defined(*(x.double() if x.is_floating_point() else x for x in inputs), eps)


@both
def test_costs_by_hand(way) -> None:
    # A slot at the place of the target: only its class costs, less 2 for a GIoU of 1. Beside it: two unit squares with
    # a unit gap, GIoU -1/3, L1 distance 2.
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [2.5, 0.5, 1.0, 1.0]])[None, None]
    found = way(torch.zeros(1, 1, 2, 1), boxes, torch.tensor([0]), boxes[0, 0, :1], torch.tensor([0]), **WEIGHTS)
    alone = 2 * class_cost(torch.zeros(1)).item()
    assert found.flatten().tolist() == pytest.approx([alone - 2, alone + 10 + 2 / 3])


@both
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_costs_are_as_near_to_their_definition_as_those_of_pytorch(way, eps: float) -> None:
    # Where p is nearly 1, float32 knows little of 1 - p, and the cost not more of its logarithm.
    for scale, bound in ((0.5, 1e-5), (3.0, 0.1)):
        inputs = draw(slots=900, classes=91, targets=20, scale=scale)
        exact = in_float64(inputs, eps)
        error = (way(*inputs, **WEIGHTS, giou_eps=eps) - exact).abs().max()
        assert error < 2 * (defined(*inputs, eps) - exact).abs().max() < bound


@both
def test_half_precision_is_read_as_it_is(way) -> None:
    logits, *rest = draw()
    logits = logits.bfloat16()
    assert torch.equal(way(logits, *rest, **WEIGHTS), way(logits.float(), *rest, **WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_and_logits_of_any_type_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits, boxes, *rest = draw()
    found = pair_costs(logits.to(dtype), boxes.to(dtype), *rest, **WEIGHTS)
    assert found.dtype == torch.float32
    assert torch.equal(found, pair_costs(logits.to(dtype).float(), boxes.to(dtype).float(), *rest, **WEIGHTS))


@both
def test_tensors_may_have_any_strides(way) -> None:
    logits, boxes, *rest = draw()
    apart = torch.randn(4, 3, 60, 7).transpose(0, 2)[10:47, :, 1:3, 1:6].permute(2, 1, 0, 3)
    apart.copy_(logits)
    planes = boxes.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(way(apart, planes, *rest, **WEIGHTS), way(logits, boxes, *rest, **WEIGHTS))


@both
def test_equal_pairs_cost_the_same_to_the_bit_wherever_they_are(way) -> None:
    logits, boxes, *rest = draw(slots=1)
    found = way(logits.repeat(1, 1, 53, 1), boxes.repeat(1, 1, 53, 1), *rest, **WEIGHTS)
    assert (found == found[..., :1]).all()


@both
def test_certain_predictions_have_finite_costs_and_only_impossible_ones_have_not(way) -> None:
    logits, boxes, _, own, image = draw(layers=1, batch=1, slots=9, classes=1, targets=1)
    logits[0, 0, :, 0] = torch.tensor([torch.inf, -torch.inf, 200, -200, 88.5, -88.5, torch.nan, 0, 0])
    boxes[0, 0, 7, 2], boxes[0, 0, 8, 1] = torch.inf, torch.nan
    inputs = (logits, boxes, torch.tensor([0]), own, image)
    found, exact = way(*inputs, **WEIGHTS)[0, 0], in_float64(inputs)[0, 0]
    assert found.isfinite().tolist() == [True] * 6 + [False] * 3
    assert torch.allclose(found[:6].double(), exact[:6], atol=1e-4)


@both
def test_no_targets_and_no_slots_have_no_costs(way) -> None:
    assert way(*draw(targets=0), **WEIGHTS).shape == (0, 2, 37)
    logits, boxes, *rest = draw()
    assert way(logits[:, :, :0], boxes[:, :, :0], *rest, **WEIGHTS).shape == (4, 2, 0)


@both
@pytest.mark.parametrize(("number", "wrong"), [(2, 5), (2, -1), (4, 3), (4, -1)])
def test_labels_and_images_that_do_not_exist_are_errors(way, number: int, wrong: int) -> None:
    inputs = list(draw())
    inputs[number] = inputs[number].clone()
    inputs[number][1] = wrong
    with pytest.raises((IndexError, AssertionError), match=r"label|image"):
        way(*inputs, **WEIGHTS)


@pytest.mark.parametrize("number", range(5))
def test_tensors_that_do_not_fit_together_are_named(number: int) -> None:
    inputs = list(draw())
    inputs[number] = inputs[number][:-1]
    with pytest.raises(ValueError, match="must be"):
        pair_costs(*inputs, **WEIGHTS)


@pytest.mark.parametrize(("number", "dtype"), [(2, torch.int32), (3, torch.float64), (4, torch.int16)])
def test_a_type_that_is_not_taken_is_named(number: int, dtype: torch.dtype) -> None:
    inputs = list(draw())
    inputs[number] = inputs[number].to(dtype)
    with pytest.raises(ValueError, match={2: "Int", 3: "Double", 4: "Short"}[number]):
        pair_costs(*inputs, **WEIGHTS)


def test_costs_have_no_gradient_whatever_has_one() -> None:
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in draw()]
    assert not pair_costs(*inputs, **WEIGHTS).requires_grad


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, threads = draw(slots=300, targets=60), torch.get_num_threads()
    try:
        found = [pair_costs(*inputs, **WEIGHTS) for n in (1, 3) if torch.set_num_threads(n) is None]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_the_operator_fits_its_schema_and_its_shape_function() -> None:
    torch.library.opcheck(
        torch.ops.assigndetr.pair_costs.default,
        (*draw(), 2.0, 5.0, 2.0, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_the_matcher_has_the_same_costs_without_compiled_code(integers: torch.dtype) -> None:
    logits, boxes, labels, own, _ = draw(batch=2, slots=20)
    parts = (slice(0, 1), slice(1, 4))
    flat = FlatTargets.of([make_target(own[part].tolist(), labels[part].tolist()) for part in parts])
    flat.labels = flat.labels.to(integers)
    found = HungarianMatcher().costs(Predictions(logits, boxes), flat)
    set_backend("reference")
    try:
        expected = HungarianMatcher().costs(Predictions(logits, boxes), flat)
    finally:
        set_backend("auto")
    assert found.shape == expected.shape == (4, 2, 20)
    assert torch.allclose(found, expected, atol=1e-5)
