"""What the benchmarks of a training step share: steps on random inputs, taken in turns, timed part by part."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from scipy import optimize
from torch import Tensor, nn

import ops
from models import build_criterion, build_detector
from models.assign import hungarian
from models.criterion import Criterion
from util import dist
from util.compile import prepare
from util.engine import StepSettings
from util.errors import UserError
from util.optim import build_optimizer, freeze
from util.rng import seed_everything
from util.structures import DetectorOutput, ImageBatch, Target

PARTS = {
    "forward": "forward",
    "criterion": "criterion",
    "matching": "- of it matching",
    "solver": "- - of it the solver, if it runs on the host",
    "backward": "backward",
    "update": "gradient norm and optimiser",
    "step": "all of it",
}

Loss = Callable[[Criterion, DetectorOutput, list[Target]], Tensor]
Samples = dict[str, dict[str, list[float]]]  # milliseconds by form and part, one per repetition


@dataclass
class Form:
    """One way to make a step; those of one model share its weights."""

    name: str  # "T = 0", "merged", "plain"
    forward: Callable[[], DetectorOutput]
    loss: Callable[[DetectorOutput], Tensor]  # scalar to back-propagate
    leaves: list[Tensor]  # what gets gradients
    update: Callable[[], None] | None = None  # None: the leaves are predictions, there is nothing to step


def add_flags(parser: argparse.ArgumentParser, *flags: tuple[str, dict[str, Any], Any, str]) -> None:
    """Add flags given as (name, further keywords, default, help)."""
    for name, keywords, default, text in flags:
        parser.add_argument(name, default=default, help=text, **keywords)


def check_least(own: Namespace, bounds: Mapping[str, int]) -> None:
    """Raise a UserError for the first flag whose number, or one of whose numbers, is below its bound."""
    for name, least in bounds.items():
        value = getattr(own, name)
        if min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"--{name} {value}: must be at least {least}")


def check_output(output: str) -> None:
    """Raise a UserError if the file `output` has no folder to lie in; better before than after all measuring."""
    if output and not Path(output).resolve().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {Path(output).parent}; make it first")


def start(args: Namespace, threads: int) -> torch.device:
    """Return the device of `args`, after choosing the operators and, unless it is 0, the number of CPU threads.

    Raises:
        UserError: a device or operators that are not there.
    """
    device = dist.init_distributed_mode(args.device, None, args.dist_timeout)
    if threads:
        torch.set_num_threads(threads)
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
    return device


def total_loss(criterion: Criterion, output: DetectorOutput, targets: list[Target]) -> Tensor:
    """Return the total of one call for all sets; sets that were decoded together share costs and losses."""
    return criterion(output, targets).total


def random_targets(counts: Sequence[int], classes: int, device: torch.device | str = "cpu") -> list[Target]:
    """Return one target per entry of `counts` with so many random objects."""
    return [
        Target(torch.randint(classes, (count,)), random_boxes(count), image_id=i, orig_size=(1, 1)).to(device)
        for i, count in enumerate(counts)
    ]


def random_boxes(*shape: int) -> Tensor:
    """Return boxes (*shape, 4): centres anywhere, sides of 0.05 to 0.45."""
    return torch.cat([torch.rand(*shape, 2), 0.05 + 0.4 * torch.rand(*shape, 2)], -1)


def random_images(batch: int, size: tuple[int, int], device: torch.device | str = "cpu") -> ImageBatch:
    """Return `batch` images of noise, all of `size` (h, w): no padding."""
    height, width = size
    padding = torch.zeros(batch, height, width, dtype=torch.bool)
    return ImageBatch(torch.randn(batch, 3, height, width), padding, [(height, width)] * batch).to(device)


def model_forms(args: Namespace, images: ImageBatch, targets: list[Target], losses: dict[str, Loss]) -> list[Form]:
    """Return whole steps of one model, as `util.engine.train_one_epoch` makes them.

    Args:
        args: describe the model and its optimiser.
        images, targets: B images and their objects, the same in every step.
        losses: names of the forms, and how each makes one number of the detector's output.
    """
    seed_everything(args.seed)
    device = images.pixels.device
    model, criterion = build_detector(args).to(device), build_criterion(args).to(device)
    prepare(model, channels_last=args.channels_last, compiled=args.compile)
    freeze(model, args.freeze)
    optimizer = build_optimizer(args, model, criterion, lr_factor=0.0)  # as much work, and the weights stay
    settings = StepSettings(args.amp, clip_max_norm=args.clip_max_norm)
    leaves = [p for group in optimizer.param_groups for p in group["params"]]

    def forward() -> DetectorOutput:
        with settings.autocast(device):
            return model(images, targets)

    def total(loss: Loss, output: DetectorOutput) -> Tensor:
        with settings.autocast(device):
            return loss(criterion, output, targets)

    def update() -> None:
        nn.utils.clip_grad_norm_(leaves, settings.clip_max_norm or float("inf"))
        optimizer.step()

    return [Form(name, forward, partial(total, loss), leaves, update) for name, loss in losses.items()]


def start_anew(form: Form) -> None:
    """Forget gradients, and draw the same dropout as every time."""
    torch.manual_seed(0)
    for leaf in form.leaves:
        leaf.grad = None


def waiter(device: torch.device) -> Callable[[], None]:
    """Return what waits until `device` has done all its work."""
    return {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)


def timed_step(form: Form, device: torch.device, *, parts: bool) -> dict[str, float]:
    """Make one step and return its milliseconds by part; without `parts` only `step`, with no wait inside."""
    ms: dict[str, float] = defaultdict(float)
    synchronize = waiter(device)

    @contextmanager
    def part(name: str, wait: bool = False) -> Iterator[None]:
        start = perf_counter()
        yield
        if wait:
            synchronize()
        ms[name] += 1000 * (perf_counter() - start)

    start_anew(form)
    synchronize()
    with (
        patch.object(Criterion, "_assign", part("matching", wait=parts)(Criterion._assign)),  # whoever matches
        patch.object(hungarian, "solve", part("solver")(hungarian.solve)),
        patch.object(hungarian, "linear_sum_assignment", part("solver")(hungarian.linear_sum_assignment)),
        patch.object(optimize, "linear_sum_assignment", part("solver")(optimize.linear_sum_assignment)),  # bench_match
        part("step", wait=True),
    ):
        with part("forward", wait=parts):
            output = form.forward()
        with part("criterion", wait=parts):
            total = form.loss(output)
        with part("backward", wait=parts):
            total.backward()
        if form.update is not None:
            with part("update", wait=parts):
                form.update()
    return dict(ms) if parts else {"step": ms["step"]}


def measure(forms: Sequence[Form], device: torch.device, *, repeats: int, warmup: int) -> Samples:
    """Return the milliseconds of every repetition by form and part; the forms take turns.

    On a GPU the whole step has a run of its own: waiting between the parts would add to it.
    """
    samples: Samples = {form.name: defaultdict(list) for form in forms}
    for repetition in range(-warmup, repeats):
        for form in forms:
            ms = timed_step(form, device, parts=True)
            if device.type != "cpu":
                ms |= timed_step(form, device, parts=False)
            for part, value in ms.items() if repetition >= 0 else ():
                samples[form.name][part].append(value)
    return samples


def medians(samples: Samples, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the median of every part by form, 0 for a part that a form does not have."""
    return {form: {part: median(own.get(part, [0.0])) for part in parts} for form, own in samples.items()}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def with_ratio(values: Mapping[str, float], base: str) -> list[str]:
    """Return each number, and in brackets its ratio to the one called `base`."""
    return [f"{value:.2f} ({ratio(value, values[base])})" for value in values.values()]


def ratio(a: float, b: float) -> str:
    """Return a / b for a table, "-" where b is 0."""
    return f"{a / b:.2f}" if b else "-"
