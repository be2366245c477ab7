"""Steps that leave themselves out on the device; fused AdamW does so on the CPU too."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.test_engine import CPU, Distance, Line, batch
from util import nonfinite
from util.checkpoint import read_checkpoint
from util.engine import StepSettings, TrainStep, train_one_epoch
from util.errors import UserError
from util.logger import Meters
from util.nonfinite import NonFiniteGuard, skips_on_device
from util.optim import ModelEma, StepSchedule
from util.train_state import TrainState

GOOD, BAD_LOSS, BAD_GRADIENT = batch(2.0), batch(3.0, label=1, image_id=42), batch(1.0, label=2)


class Run:
    """A run over given batches with fused AdamW."""

    def __init__(self, *, deferred: bool, limit: int = 20, output_dir=None, **settings) -> None:
        self.settings = StepSettings(**{"clip_max_norm": 0.5, **settings})
        model, criterion = Line(), Distance()
        model.slope.data.fill_(1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=self.settings.amp == "fp16")
        schedule, ema = StepSchedule(optimizer, []), ModelEma(model, 0.5)
        self.state = TrainState(model, criterion, optimizer, schedule, scaler, ema, {}, ["a"], [1])
        self.guard = NonFiniteGuard(output_dir, limit, deferred=deferred)

    def train(self, batches, save=None) -> dict[str, float]:
        step = TrainStep(self.state.model, self.state.criterion)
        return train_one_epoch(step, batches, self.state, self.settings, self.guard, CPU, save)

    def weights(self) -> list[float]:
        """Return the weight, its average and the moments."""
        moments = next(iter(self.state.optimizer.state.values()))
        own = [self.state.model.slope, self.state.ema.module.slope, *moments.values()]
        return [value.item() for value in own]


@pytest.mark.parametrize(
    "batches",
    [
        [GOOD, GOOD],
        [GOOD, BAD_LOSS, GOOD],
        [GOOD, BAD_GRADIENT, GOOD],
        [BAD_LOSS, GOOD, BAD_GRADIENT, BAD_LOSS, GOOD],
    ],
)
def test_a_deferred_guard_leaves_out_the_steps_that_an_asking_one_does(batches) -> None:
    asking, deferred = Run(deferred=False), Run(deferred=True)
    logs = [run.train(batches) for run in (asking, deferred)]
    assert deferred.weights() == pytest.approx(asking.weights(), rel=1e-6)
    for name in ("loss", "loss_ce", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name])
    assert deferred.state.ema.state_dict()["updates"] == asking.state.ema.updates
    assert deferred.guard.in_a_row == asking.guard.in_a_row == 0


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT])
def test_one_bad_batch_voids_its_window_of_accumulated_batches_on_the_device(bad) -> None:
    found = []
    for deferred in (False, True):
        run = Run(deferred=deferred, grad_accum_steps=2)
        run.train([GOOD, bad, GOOD, GOOD])
        found.append(run.weights())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[1][2] == 1.0  # Adam's own count of steps


def test_an_infinite_loss_with_finite_gradients_moves_nothing() -> None:
    # Its gradient is 0 x the mean: only the factor of `voided` tells.
    run = Run(deferred=True)
    run.state.criterion.forward = lambda *_: nonfinite.LossReport(run.state.model.slope + torch.inf, {}, {})
    run.train([GOOD])
    assert run.state.model.slope.item() == 1.0


def test_answers_come_late_with_the_batch_and_its_image_ids(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(nonfinite._Answer, "ready", lambda self: False)
    run, seen = Run(deferred=True, output_dir=tmp_path, save_steps=1), []
    finish = run.guard.finish
    run.guard.finish = lambda: (seen.append(len(list(tmp_path.iterdir()))), finish())
    run.train([GOOD, BAD_LOSS, GOOD], save=lambda: None)
    assert seen == [0, 0, 1]  # written when the answers are waited for, which they are before weights are saved
    text = capsys.readouterr().out
    assert "epoch 0 step 1: the loss is inf; not finite: loss_ce; image ids [42]; step skipped" in text
    assert read_checkpoint(tmp_path / "nonfinite_epoch0_step1_rank0.pth")["targets"][0]["image_id"] == 42


def test_gradients_that_are_not_finite_are_told_without_names(capsys) -> None:
    Run(deferred=True).train([GOOD, BAD_GRADIENT, GOOD])
    assert "epoch 0 step 1: the loss is finite and the gradient is not; step skipped" in capsys.readouterr().out


@pytest.mark.parametrize("late", [False, True])
def test_too_many_in_a_row_stop_at_the_latest_a_few_steps_after(late: bool, monkeypatch) -> None:
    monkeypatch.setattr(nonfinite._Answer, "ready", lambda self: not late)
    run = Run(deferred=True, limit=3)
    run.train([BAD_LOSS, BAD_LOSS, GOOD, BAD_LOSS, BAD_GRADIENT, GOOD])  # never three in a row
    with pytest.raises(UserError, match=r"3 non-finite losses in a row \(--max_nonfinite 3\)"):
        run.train([BAD_LOSS] * 20)
    assert run.state.step - 6 == (4 + nonfinite.LATEST // 2 if late else 4)
    assert run.state.model.slope.isfinite()


@pytest.mark.parametrize("early", [True, False])
def test_several_processes_look_at_an_answer_in_the_same_step_whenever_it_came(early: bool, monkeypatch) -> None:
    monkeypatch.setattr(nonfinite.dist, "is_distributed", lambda: True)
    monkeypatch.setattr(nonfinite.dist, "everywhere", lambda flag: flag)
    monkeypatch.setattr(nonfinite._Answer, "ready", lambda self: early)
    run = Run(deferred=True, limit=1)
    guard, losses = run.guard, TrainStep(run.state.model, run.state.criterion)
    images, targets = BAD_LOSS
    report, told = losses(images, targets, 0, 0.0), 0
    with pytest.raises(UserError, match="1 non-finite losses in a row"):
        for step in range(20):
            guard.loss_is_finite(report, images, targets, epoch=0, step=step)
            told += 1
    assert told == nonfinite.LATEST + 1


def test_fp16_leaves_out_the_same_steps() -> None:
    found = []
    for deferred in (False, True):
        run = Run(deferred=deferred, amp="fp16")
        run.train([GOOD, BAD_GRADIENT, GOOD])
        found.append(run.weights())
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_averages_count_only_what_is_kept() -> None:
    meters = Meters()
    for value, keep in ((1.0, True), (torch.nan, False), (4.0, True)):
        meters.update({"loss": torch.tensor(value)}, torch.tensor(keep))
    assert meters.averages() == {"loss": 2.5}
    meters.update({"other": torch.tensor(torch.inf)}, torch.tensor(False))
    assert meters.averages() == {"loss": 2.5}


def test_the_average_of_the_weights_continues_from_a_file_with_the_right_decay() -> None:
    model = Line()
    asking, deferred = ModelEma(model, 0.9), ModelEma(model, 0.9)
    for ema, keep in ((asking, True), (deferred, torch.tensor(True))):
        for weight in (1.0, 2.0, 3.0):
            model.slope.data.fill_(weight)
            ema.update(model, keep)
            ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert deferred.module.slope.item() == pytest.approx(asking.module.slope.item())
    assert deferred.updates == asking.updates == 3


def test_only_fused_adamw_on_a_gpu_leaves_steps_out_by_itself() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert not skips_on_device(torch.optim.AdamW(parameters, fused=True))  # the CPU has nothing to wait for
    assert not skips_on_device(torch.optim.SGD(parameters))
