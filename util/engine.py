"""One epoch of training and one evaluation.

The whole training step is in `train_one_epoch`; what it changes is in `TrainState`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from util import dist
from util.correspondence import Correspondences
from util.flips import Flips
from util.logger import Meters, Progress, max_memory_mb
from util.nonfinite import NonFiniteGuard, voided
from util.rng import isolated_rng
from util.structures import Detections, ImageBatch, LossReport, Target
from util.train_state import TrainState

AMP_TYPES = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class TrainStep(nn.Module):
    """Detector and criterion in one module, the one that DistributedDataParallel wraps.

    A criterion with parameters (a learned matcher) outside the wrapper would have other gradients in every process.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion

    def forward(self, images: ImageBatch, targets: list[Target], epoch: int, done: float = 0.0) -> LossReport:
        """Return the losses of a batch in `epoch`, counted from 0, of which the share `done` is over."""
        return self.criterion(self.model(images, targets, epoch), targets, epoch + done)


def distribute(step: TrainStep, device: torch.device, find_unused_parameters: bool = False) -> nn.Module:
    """Wrap `step` for several processes; a single process gets it back as it is."""
    if not dist.is_distributed():
        return step
    return DistributedDataParallel(
        step,
        device_ids=[device.index] if device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
    )


@dataclass(frozen=True)
class StepSettings:
    """How a step is made, as far as the command line decides it."""

    amp: str = "off"  # off, fp16, bf16
    grad_accum_steps: int = 1
    clip_max_norm: float = 0.1  # 0: no clipping
    print_freq: int = 10
    save_steps: int = 0  # 0: never inside an epoch

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of forward passes."""
        dtype = AMP_TYPES[self.amp]
        return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def train_one_epoch(
    train_step: nn.Module,
    loader: DataLoader,
    state: TrainState,
    settings: StepSettings,
    guard: NonFiniteGuard,
    device: torch.device,
    save: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train the epoch after `state.epoch`, from batch `state.step` on.

    Args:
        train_step: `TrainStep` over `state.model`, perhaps inside DDP.
        loader: batches; its sampler already knows the epoch and the first batch.
        save: called after every `settings.save_steps` optimiser steps.

    Returns:
        Averages over the epoch and over processes, keys as in the family's `log.txt` without the prefix `train_`.
    """
    train_step.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    epoch, batches = state.epoch + 1, len(loader)
    progress = Progress(f"Epoch: [{epoch}]", batches, start=state.step, print_freq=settings.print_freq)
    shown = {"lr": lambda: f"{state.optimizer.param_groups[0]['lr']:.6f}"}
    healthy = True  # no bad loss in this window of accumulated batches
    for images, targets in progress.over(loader, state.meters, shown):
        images = images.to(device, non_blocking=True)
        targets = [t.to(device, non_blocking=True) for t in targets]
        # The last window of an epoch may be shorter; it still steps, with the mean over its own batches.
        first = state.step - state.step % settings.grad_accum_steps
        window = min(settings.grad_accum_steps, batches - first)
        state.step += 1
        window_ends = state.step == first + window

        with nullcontext() if window_ends or not dist.is_distributed() else train_step.no_sync():
            with settings.autocast(device):
                report = train_step(images, targets, epoch, (state.step - 1) / batches)
            finite = guard.loss_is_finite(report, images, targets, epoch=epoch, step=state.step - 1)
            healthy = healthy and finite is not False  # what is known on the device only is settled there
            if healthy:
                state.scaler.scale(voided(report.total, finite) / window).backward()
        state.meters.update_losses(report, finite)
        if not window_ends:
            continue

        if healthy:
            update_weights(state, settings, guard)
        state.optimizer.zero_grad(set_to_none=True)
        healthy = True
        steps = state.step // settings.grad_accum_steps
        if save and settings.save_steps and steps % settings.save_steps == 0 and state.step < batches:
            guard.finish()
            save()

    guard.finish()
    stats = state.meters.global_averages()
    dist.info(f"Epoch: [{epoch}] took {progress.seconds:.0f} s, {progress.data_seconds:.0f} s of it waiting for data")
    lr = state.optimizer.param_groups[0]["lr"]
    return {"lr": lr, **stats, "epoch_time": progress.seconds, "max_memory_mb": max_memory_mb()}


def update_weights(state: TrainState, settings: StepSettings, guard: NonFiniteGuard) -> None:
    """Clip, step, average, count.

    A criterion with parameters (a learned matcher) is clipped on its own: its early, large gradients would otherwise
    use up the bound of the detector. With a deferred guard the schedule counts steps that the device leaves out, too.
    """
    state.scaler.unscale_(state.optimizer)
    limit = settings.clip_max_norm or float("inf")
    learned = list(state.criterion.parameters())
    apart = {id(p) for p in learned}
    parameters = [p for group in state.optimizer.param_groups for p in group["params"] if id(p) not in apart]
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    norms = {"grad_norm": norm}
    if learned:
        norms["grad_norm_matcher"] = nn.utils.clip_grad_norm_(learned, limit)
    both = torch.stack(list(norms.values())).norm()
    where = {"epoch": state.epoch + 1, "step": state.step - 1, "scaled": state.scaler.is_enabled()}
    finite = guard.gradient_is_finite(both, state.model, state.criterion, **where)
    if finite is not False:
        state.meters.update(norms, finite)
        _step(state, finite)
        if state.ema is not None:
            state.ema.update(state.model, finite)
    state.scaler.update()
    state.schedule.after_step()


def _step(state: TrainState, finite: bool | Tensor) -> None:
    """Move the weights; where `finite` is a scalar on the device, only if it is true there."""
    if isinstance(finite, Tensor) and not state.scaler.is_enabled():
        state.optimizer.found_inf = (~finite).float()  # the way in which the scaler of fp16 tells fused optimisers
        state.optimizer.step()
        del state.optimizer.found_inf
    else:
        state.scaler.step(state.optimizer)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module | None,
    postprocessor: nn.Module,
    loader: DataLoader,
    evaluator,
    settings: StepSettings,
    device: torch.device,
    *,
    epoch: int = 0,
    keep: int = 0,
    flips: Flips | None = None,
    correspondences: Correspondences | None = None,
) -> tuple[dict[str, float | list[float]], list[Detections]]:
    """Evaluate on the images of `loader`; leaves no trace in the random numbers of training.

    Args:
        model: without DDP around it.
        criterion: to log losses as well; None: not.
        evaluator: gets the detections of this process and merges those of the others.
        keep: number of images whose detections are returned, for drawing.
        flips: remembers which queries objects had in the evaluation before; with a criterion only.
        correspondences: notes those of its images.

    Returns:
        Averages of the losses and the results of the evaluator, keys as in `log.txt` without the prefix `test_`; and
        the detections of the first images.
    """
    model.eval()
    if criterion is not None:
        criterion.eval()
    meters, kept = Meters(), []
    progress = Progress("Test:", len(loader), print_freq=settings.print_freq)
    with isolated_rng():
        for images, targets in progress.over(loader, meters):
            images = images.to(device, non_blocking=True)
            targets = [t.to(device, non_blocking=True) for t in targets]
            with settings.autocast(device):
                output = model(images, None, epoch)
                if criterion is not None:
                    report = criterion(output, targets)
                    meters.update_losses(report)
                    if flips is not None and report.chosen is not None:
                        flips.see(targets, report.chosen)
                if correspondences is not None:
                    correspondences.see(output, targets)
            detections = postprocessor(output, [t.orig_size for t in targets], [t.image_id for t in targets])
            evaluator.update(detections, targets)
            kept += detections[: keep - len(kept)] if len(kept) < keep else []
        stats = meters.global_averages()
        if flips is not None:
            stats.update(flips.finish())
        evaluator.synchronize()
        stats.update(evaluator.summarize())
    return stats, kept
