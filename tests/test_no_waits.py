"""A whole optimisation step on a device without values: whatever would make the host wait for a GPU fails here.

The device "meta" knows shapes and types only. `.item()`, `.tolist()`, `.cpu()`, `nonzero`, indexing by a mask and `if` on
a tensor are errors on it. So this needs no GPU; tests/test_gpu.py runs the same steps on one where there is one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from models import build_model
from models.assign import hungarian
from tests.tiny import TWO_STAGE, tiny_args, tiny_images, tiny_targets
from tests.waitless import FLAGS
from util import nonfinite
from util.engine import StepSettings, TrainStep, train_one_epoch
from util.logger import Meters
from util.optim import ModelEma, StepSchedule
from util.train_state import TrainState

META = torch.device("meta")


@pytest.fixture
def gpu_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the device "meta" as a GPU, whose answers never come."""
    monkeypatch.setattr(hungarian, "gpu_solver_ready", lambda device: device.type == "meta")
    fused_checks = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(fused_checks, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(nonfinite._Answer, "ready", lambda self: False)
    # The device has no mixed precision, and so none to switch off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # A line of the progress and the end of an epoch ask for numbers, now and then.
    monkeypatch.setattr(Meters, "flush", lambda self: None)
    monkeypatch.setattr(nonfinite.NonFiniteGuard, "finish", lambda self: None)


def take_step(model: nn.Module, criterion: nn.Module, steps: int = 2) -> TrainState:
    """Train an epoch of a few batches: forward, losses, backward, clipping, weights, their average, meters."""
    model, criterion = model.to(META), criterion.to(META)
    batches = [(tiny_images(), tiny_targets())] * steps
    parameters = [p for module in (model, criterion) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    schedule, scaler = StepSchedule(optimizer, []), torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, criterion, optimizer, schedule, scaler, ModelEma(model, 0.9), {}, ["a"], [1])
    guard = nonfinite.NonFiniteGuard(None, 9, deferred=True)
    train_one_epoch(TrainStep(model, criterion), batches, state, StepSettings(), guard, META)
    return state


@pytest.mark.parametrize("flags", FLAGS)
def test_a_training_step_never_waits_for_the_device(flags: str, gpu_without_values: None) -> None:
    model, criterion, _ = build_model(tiny_args(flags))
    state = take_step(model, criterion)
    assert state.schedule.steps_done == 2
    assert "loss" in next(iter(state.meters._pending))


@pytest.mark.parametrize(
    ("question", "error"),
    [
        (lambda x: x.sum().item(), RuntimeError),
        (lambda x: x.tolist(), NotImplementedError),
        (lambda x: x.cpu(), NotImplementedError),
        (lambda x: x.nonzero(), NotImplementedError),
        (lambda x: x[x > 0], NotImplementedError),
        (lambda x: bool((x > 0).any()), RuntimeError),
    ],
)
def test_the_device_without_values_notices_what_waits(question, error: type[Exception]) -> None:
    with pytest.raises(error):
        question(torch.ones(3, device="meta"))


def test_the_host_way_of_the_matcher_waits(gpu_without_values: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hungarian, "gpu_solver_ready", lambda device: False)
    model, criterion, _ = build_model(tiny_args(TWO_STAGE))
    with pytest.raises(NotImplementedError, match="no data"):
        take_step(model, criterion, steps=1)
