"""A whole optimisation step on a device without values: whatever would make the host wait for a GPU fails here.

The device "meta" knows shapes and types only. `.item()`, `.tolist()`, `.cpu()`, `nonzero`, indexing by a mask and `if`
on a tensor are errors on it, and copies to it that block are counted. So this needs no GPU; tests/test_gpu.py runs the
same steps on one where there is one.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch

from models import build_model
from models.assign import hungarian
from tests.tiny import TWO_STAGE, tiny_args
from tests.waitless import FLAGS, ask_nothing, new_state, take_steps
from tests.waits import Waits
from util import nonfinite

META = torch.device("meta")


@pytest.fixture
def gpu_without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the device "meta" as a GPU, whose answers never come."""
    for compiled in ("gpu_solver_ready", "pair_costs_ready"):
        monkeypatch.setattr(hungarian, compiled, lambda device: device.type == "meta")
    fused_checks = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(fused_checks, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(nonfinite._Answer, "ready", lambda self: False)
    # The device has no mixed precision, and so none to switch off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    ask_nothing(monkeypatch)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_training_step_never_waits_for_the_device(flags: str, gpu_without_values: None) -> None:
    state = new_state(*build_model(tiny_args(flags))[:2], META)
    with Waits() as waits:  # a copy to the device that blocks is no error there
        take_steps(state, META)
    assert not waits.found
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
    state = new_state(*build_model(tiny_args(TWO_STAGE))[:2], META)
    with pytest.raises(NotImplementedError, match="no data"):
        take_steps(state, META)
