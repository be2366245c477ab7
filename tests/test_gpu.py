"""The whole training step on a GPU; what runs on the CPU everywhere must give the same numbers there."""

from __future__ import annotations

import pytest
import torch

import ops
from models import build_criterion, build_model
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from tests.unit.soft_cases import output_of, random_predictions, random_target
from util.structures import Predictions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def losses(device: str, flags: str) -> dict[str, float]:
    torch.manual_seed(5)
    model, criterion, _ = build_model(tiny_args(flags))
    model, criterion = model.to(device), criterion.to(device)
    images, targets = tiny_images().to(device), [t.to(device) for t in tiny_targets()]
    report = criterion(model(images, targets), targets)
    report.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    return {name: value.item() for name, value in report.terms.items()}


@pytest.mark.parametrize("flags", ["", f"{TWO_STAGE} --mixed_selection --look_forward_twice"])
def test_losses_on_the_gpu_are_those_on_the_cpu(flags: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    assert losses("cuda", flags) == pytest.approx(losses("cpu", flags), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mixed_precision_step_on_the_gpu_is_finite(dtype: torch.dtype) -> None:
    with torch.autocast("cuda", dtype):
        assert losses("cuda", TWO_STAGE)["loss_ce"] > 0


@pytest.mark.parametrize(
    "flags",
    [
        "--matcher cost-greedy",
        "--matcher soft",
        "--matcher soft-literal",
        "--matcher soft --scg rounds --soft_extra_layers 1 --cls_target hard",
        "--matcher soft --scg rowpeak --column_competition sinkhorn --no-soft_background",
        "--matcher soft --probe_per_layer --layer_consistency last --probe_value prediction",
    ],
)
def test_matching_without_a_solver_and_its_losses_never_wait_for_the_gpu(flags: str) -> None:
    criterion = build_criterion(tiny_args(flags)).to("cuda")
    predictions = random_predictions()
    predictions = Predictions(
        predictions.logits.cuda().requires_grad_(),
        predictions.boxes.cuda().requires_grad_(),
        embeds=[x.cuda().requires_grad_() for x in predictions.embeds],
    )
    for targets in ([random_target(5), random_target(2)], [make_target(), make_target()]):
        on_device = [t.to("cuda") for t in targets]
        criterion(output_of(predictions), on_device, 0.0).total.backward()  # kernels and memory are there afterwards
        torch.cuda.set_sync_debug_mode("error")
        try:
            criterion(output_of(predictions), on_device, 0.0).total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_compiled_kernel_is_the_one_in_use() -> None:
    assert ops.active_backend("cuda") == "cuda"
