"""The training step on a model small enough to compute by hand, and evaluation."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from util.checkpoint import read_checkpoint
from util.engine import StepSettings, TrainStep, evaluate, train_one_epoch
from util.errors import UserError
from util.nonfinite import NonFiniteGuard
from util.optim import ModelEma, StepSchedule
from util.structures import ImageBatch, LossReport, Target
from util.train_state import TrainState

CPU = torch.device("cpu")


class Line(nn.Module):
    """prediction = slope x mean pixel."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(()))

    def forward(self, images, targets=None, epoch=0):
        return self.slope * images.pixels.flatten(1).mean(1)


class Distance(nn.Module):
    """The mean of the predictions; a target labelled 1 makes the loss infinite, one labelled 2 only its gradient."""

    def forward(self, output, targets, time=None) -> LossReport:
        labels = torch.cat([t.labels for t in targets])
        value = output.mean()
        if (labels == 1).any():
            value = value / torch.zeros(())
        if (labels == 2).any():
            value = value + (output.mean() * 0).sqrt()
        return LossReport(value, {"loss_ce": value.detach(), "fine": torch.zeros(())}, {"loss_ce": 1.0})


def batch(pixel: float, label: int = 0, image_id: int = 0) -> tuple[ImageBatch, list[Target]]:
    pixels = torch.full((1, 3, 2, 2), pixel)
    target = Target(torch.tensor([label]), torch.full((1, 4), 0.5), image_id=image_id, orig_size=(2, 2))
    return ImageBatch(pixels, torch.zeros(1, 2, 2, dtype=torch.bool), [(2, 2)]), [target]


@dataclass
class Run:
    """A run over given batches with plain SGD of rate 1."""

    settings: StepSettings = field(default_factory=lambda: StepSettings(clip_max_norm=0.0))
    limit: int = 20
    output_dir: object = None
    ema: bool = False

    def __post_init__(self):
        model, criterion = Line(), Distance()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        self.state = TrainState(
            model=model,
            criterion=criterion,
            optimizer=optimizer,
            schedule=StepSchedule(optimizer, []),
            scaler=torch.amp.GradScaler("cpu", enabled=self.settings.amp == "fp16"),
            ema=ModelEma(model, 0.1) if self.ema else None,
            args={},
            class_names=["a"],
            category_ids=[1],
        )
        self.guard = NonFiniteGuard(self.output_dir, self.limit)

    def train(self, batches, save=None) -> dict[str, float]:
        step = TrainStep(self.state.model, self.state.criterion)
        return train_one_epoch(step, batches, self.state, self.settings, self.guard, CPU, save)

    @property
    def slope(self) -> float:
        return self.state.model.slope.item()


def test_a_step_goes_down_the_gradient():
    run = Run()
    stats = run.train([batch(2.0), batch(3.0)])
    assert run.slope == -5.0
    assert stats["grad_norm"] == 2.5
    assert stats["loss"] == pytest.approx((0 + -2.0 * 3) / 2)
    assert run.state.schedule.steps_done == 2


def test_accumulated_batches_count_as_their_mean_and_the_last_short_window_steps_too():
    run = Run(StepSettings(grad_accum_steps=2, clip_max_norm=0.0))
    run.train([batch(2.0), batch(4.0), batch(10.0)])
    assert run.slope == -(3.0 + 10.0)
    assert run.state.schedule.steps_done == 2


def test_gradients_are_clipped_by_their_norm():
    run = Run(StepSettings(clip_max_norm=0.5))
    assert run.train([batch(2.0)])["grad_norm"] == 2.0
    assert run.slope == pytest.approx(-0.5)


def test_the_average_follows_every_step():
    run = Run(ema=True)
    run.train([batch(2.0)])
    assert run.state.ema.module.slope.item() == pytest.approx(-2.0 * 0.9)


def test_the_middle_of_an_epoch_is_saved_after_whole_windows_only():
    run = Run(StepSettings(grad_accum_steps=2, save_steps=1, clip_max_norm=0.0))
    saved = []
    run.train([batch(1.0)] * 7, save=lambda: saved.append(run.state.step))
    assert saved == [2, 4, 6]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_takes_the_same_step(amp):
    run = Run(StepSettings(amp=amp, clip_max_norm=0.5))
    run.train([batch(2.0)])
    assert run.slope == pytest.approx(-0.5)


def test_an_infinite_loss_skips_its_step_names_it_and_keeps_the_batch(tmp_path, capsys):
    run = Run(output_dir=tmp_path)
    run.state.model.slope.data.fill_(1.0)
    stats = run.train([batch(2.0), batch(3.0, label=1, image_id=42), batch(4.0)])
    assert run.slope == 1.0 - 6.0
    assert stats["loss"] == pytest.approx((2.0 - 4.0) / 2)  # the bad step is not averaged in
    text = capsys.readouterr().out
    assert "epoch 0 step 1: the loss is -inf; not finite: loss_ce; image ids [42]; step skipped" in text
    dumped = read_checkpoint(tmp_path / "nonfinite_epoch0_step1_rank0.pth")
    assert torch.equal(dumped["pixels"], torch.full((1, 3, 2, 2), 3.0))
    assert dumped["targets"][0]["image_id"] == 42


def test_an_infinite_loss_voids_the_whole_window_of_accumulated_batches():
    run = Run(StepSettings(grad_accum_steps=2, clip_max_norm=0.0))
    run.state.model.slope.data.fill_(1.0)
    run.train([batch(2.0), batch(3.0, label=1), batch(4.0), batch(6.0)])
    assert run.slope == 1.0 - 5.0


def test_an_infinite_gradient_skips_its_step(capsys):
    run = Run()
    run.train([batch(2.0, label=2), batch(4.0)])
    assert run.slope == -4.0
    assert "the gradient is not, in 1 parameters, for example slope" in capsys.readouterr().out


def test_too_many_infinite_losses_in_a_row_stop_with_advice():
    run = Run(limit=3)
    run.state.model.slope.data.fill_(1.0)
    bad, good = batch(1.0, label=1), batch(0.0)
    run.train([bad, bad, good, bad, bad, good])  # never three in a row
    with pytest.raises(UserError, match=r"3 non-finite losses in a row \(--max_nonfinite 3\).*--lr.*--amp"):
        run.train([bad] * 3)


class Collector:
    """An evaluator that only remembers."""

    def __init__(self):
        self.images = []

    def update(self, detections, targets):
        self.images += detections

    def synchronize(self):
        pass

    def summarize(self):
        return {"coco_eval_bbox": [0.5] * 12}


def test_evaluation_averages_losses_and_leaves_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert torch.rand(1) == expected[0]

    def postprocess(output, sizes, ids):
        torch.rand(5)
        return list(ids)

    run, evaluator = Run(), Collector()
    run.state.model.slope.data.fill_(1.0)
    batches = [batch(2.0, image_id=7), batch(4.0, image_id=8)]
    stats, kept = evaluate(
        run.state.model, run.state.criterion, postprocess, batches, evaluator, run.settings, CPU, keep=1
    )
    assert (stats["loss"], stats["coco_eval_bbox"]) == (3.0, [0.5] * 12)
    assert (evaluator.images, kept) == ([7, 8], [7])
    assert torch.rand(1) == expected[1]
