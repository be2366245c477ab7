"""`--compile` and `--channels_last`: the same numbers and names, no graph break, in training and evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from models import build_model
from tests.tiny import tiny_args, tiny_images, tiny_targets
from util.compile import compile_parts, prepare

FLAGS = (
    "--with_box_refine --two_stage --mixed_selection --query_pos box --decoder_norm --dn_number 6 "
    "--num_queries_one2many 6 --k_one2many 2"
)


def built(flags: str):
    torch.manual_seed(0)
    return build_model(tiny_args(flags))


def step(model, criterion, sizes) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    targets = tiny_targets()[: len(sizes)]
    total = criterion(model(tiny_images(sizes), targets), targets).total
    model.zero_grad()
    total.backward()
    return total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_detector_trains_with_the_same_numbers_and_without_a_graph_break() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, criterion, _ = built(FLAGS)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    parts = compile_parts(model, backend="aot_eager")  # traces forward and backward, and compiles nothing
    assert len(parts) == 4  # backbone, one encoder and two decoder layers
    for sizes in ([(64, 96), (48, 57)], [(96, 80), (70, 64)]):
        (loss, gradients), (expected, wanted) = step(model, criterion, sizes), step(plain, criterion, sizes)
        assert loss == pytest.approx(expected, rel=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(model.state_dict()) == names


def test_channels_last_changes_the_layout_of_the_backbone_only() -> None:
    model, criterion, _ = built(FLAGS)
    plain = copy.deepcopy(model)
    prepare(model, channels_last=True)
    assert model.backbone[0].body.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    maps = model.backbone[0](tiny_images().pixels)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    (loss, _), (expected, _) = (step(one, criterion, [(64, 96), (48, 57)]) for one in (model, plain))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
