"""The second test before a training: can this command line learn one batch? `main.py --overfit_batch` with any flags.

A detector that cannot learn two images by heart will not learn a data set. The batch is the first of the training set,
of images that have objects, at the evaluation size and without augmentation; it is the same in every step. Everything
else is what training uses: model, criterion, optimiser with its groups and rates, clipping, mixed precision, dropout.
Changed are, because a few hundred steps leave no room for them: no warm-up (`--warmup_steps 0`), no drop of the rates,
no accumulation, no average of the weights. The steps count as a whole training of `EPOCHS` epochs, so that schemes
which change in its course go through all their phases. No checkpoint is written.

The test is passed once the loss is at most `LOSS_SHARE` of that of the first step and the detections, judged as in an
evaluation against what the model was taught, reach `AP50`. It stops there, or after `--overfit_steps`.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch

from datasets import BUILDERS, build_transforms
from datasets.base import DetectionDataset, silent_coco
from datasets.collate import collate
from datasets.evaluators import CocoEvaluator
from datasets.samplers import TrainBatchSampler
from models import build_model
from util import dist
from util.bench_common import start
from util.boxes import cxcywh_to_xyxy
from util.checkpoint import init_from
from util.engine import StepSettings, TrainStep, update_weights
from util.environment import effective_batch, prepare_output_dir
from util.errors import UserError
from util.nonfinite import NonFiniteGuard
from util.optim import StepSchedule, build_optimizer, freeze, lr_scale_factor
from util.overfit_hints import SURE, hints
from util.rng import isolated_rng, seed_everything
from util.structures import Detections, ImageBatch, Target
from util.train_state import TrainState

EPOCHS = 20
LOSS_SHARE, AP50 = 0.5, 0.9
TRIED = 1000  # images looked at for objects


@dataclass
class Run:
    """The parts of the test and what it has seen so far."""

    state: TrainState
    settings: StepSettings
    guard: NonFiniteGuard
    postprocessor: torch.nn.Module
    device: torch.device
    images: ImageBatch
    targets: list[Target]
    losses: list[float] = field(default_factory=list)  # of every step
    ap50: list[tuple[int, float]] = field(default_factory=list)  # (steps done, AP50)

    @property
    def share(self) -> float:
        """The loss of the last steps over that of the first one."""
        recent = self.losses[-5:]
        return sum(recent) / len(recent) / self.losses[0] if self.losses else 1.0

    @property
    def passed(self) -> bool:
        return self.share <= LOSS_SHARE and self.ap50[-1][1] >= AP50


def overfit_command(args: Namespace) -> int:
    """Run `main.py --overfit_batch`; return 0 if the batch was learned, 1 if not."""
    device = start(args, threads=0)
    if dist.is_distributed():
        raise UserError("--overfit_batch is a test of one process: start it by python, without torchrun or srun")
    folder = prepare_output_dir(args.output_dir)
    dataset = BUILDERS[args.dataset_file]("train", args, transforms=build_transforms("val", args))
    batch = first_batch(dataset, args.batch_size, args.seed)
    run = build_run(args, dataset, batch, device)
    ids = [target.image_id for target in run.targets]
    dist.info(f"one batch on {device}: image ids {ids} with {[len(t) for t in run.targets]} objects")
    before = detect(run)
    try:
        after = learn(run, args.overfit_steps)
    except UserError as error:  # of the guard: the loss is no number any more
        dist.info(f"FAIL after {len(run.losses)} steps: {error}")
        return 1
    if folder is not None:
        dist.info(f"written: {', '.join(map(str, _write(folder, run, before, after)))}")
    steps, ap50 = run.ap50[-1]
    numbers = (
        f"loss {100 * run.share:.0f}% of its start (needs {100 * LOSS_SHARE:.0f}%), AP50 {ap50:.2f} (needs {AP50})"
    )
    dist.info(f"{'PASS' if run.passed else 'FAIL'} after {steps} steps: {numbers}")
    if run.passed:
        return 0
    for line in hints(args, run.losses, run.ap50, run.targets, after, dataset.class_names):
        dist.info(f"  - {line}")
    return 1


def first_batch(dataset: DetectionDataset, size: int, seed: int) -> tuple[ImageBatch, list[Target]]:
    """Return the first images of the first epoch that have objects.

    Raises:
        UserError: none of the first images has one.
    """
    sampler = TrainBatchSampler(dataset, batch_size=1, seed=seed)
    samples = []
    for index in sampler.order()[:TRIED]:
        sample = dataset[index]
        samples += [sample] * (len(sample[1]["labels"]) > 0)
        if len(samples) == size:
            break
    if not samples:
        raise UserError(
            f"--overfit_batch: none of {min(TRIED, len(dataset))} training images has an object; look at the set with "
            "--check_data"
        )
    return collate(samples)


def build_run(
    args: Namespace, dataset: DetectionDataset, batch: tuple[ImageBatch, list[Target]], device: torch.device
) -> Run:
    """Return model, criterion and optimiser of the flags, with the changes that the head of this file names."""
    # The number of epochs is what schemes measure their phases by.
    args = Namespace(**{**vars(args), "epochs": EPOCHS, "num_classes": args.num_classes or dataset.num_classes})
    seed_everything(args.seed)
    model, criterion, postprocessor = build_model(args)
    if args.init_from:
        report, _ = init_from(model, args.init_from, dataset.class_names, args.init_class_rows)
        dist.info(f"--init_from {args.init_from}: took {len(report.loaded)} tensors")
    freeze(model, args.freeze)
    model, criterion = model.to(device), criterion.to(device)
    factor = lr_scale_factor(args.lr_scale, effective_batch(args), args.recipe_batch_size)
    optimizer = build_optimizer(args, model, criterion, factor)
    state = TrainState(
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=StepSchedule(optimizer, []),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        ema=None,
        args={},
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
    )
    settings = StepSettings(args.amp, clip_max_norm=args.clip_max_norm)
    guard = NonFiniteGuard(None, args.max_nonfinite)
    images, targets = batch
    return Run(state, settings, guard, postprocessor, device, images.to(device), [t.to(device) for t in targets])


def learn(run: Run, most: int) -> list[Detections]:
    """Train until the test is passed, at most so many steps; return the last detections."""
    state, began = run.state, time.monotonic()
    step = TrainStep(state.model, state.criterion)
    every = max(most // EPOCHS, 1)
    found = judge(run)
    while len(run.losses) < most:
        step.train()
        epoch = len(run.losses) // every
        for _ in range(min(every, most - len(run.losses))):
            _one_step(run, step, min(epoch, EPOCHS - 1), len(run.losses) % every / every)
        found = judge(run)
        done = len(run.losses)
        left = timedelta(seconds=int((time.monotonic() - began) / done * (most - done)))
        dist.info(
            f"step {done:{len(str(most))}d}/{most}  loss: {run.losses[-1]:.3f} ({100 * run.share:.0f}% of the start)  "
            f"AP50: {run.ap50[-1][1]:.3f}  eta: {left} at most"
        )
        if run.passed:
            break
    return found


def _one_step(run: Run, step: TrainStep, epoch: int, done: float) -> None:
    """Make one step of training, as `util.engine.train_one_epoch` does."""
    state = run.state
    with run.settings.autocast(run.device):
        report = step(run.images, run.targets, epoch, done)
    if run.guard.loss_is_finite(report, run.images, run.targets, epoch=epoch, step=len(run.losses)):
        state.scaler.scale(report.total).backward()
        update_weights(state, run.settings, run.guard)
    state.optimizer.zero_grad(set_to_none=True)
    run.losses.append(report.total.item())


@torch.no_grad()
def detect(run: Run) -> list[Detections]:
    """Return the detections on the images of the batch; leaves the random numbers of training alone."""
    model, targets = run.state.model.eval(), run.targets
    with isolated_rng(), run.settings.autocast(run.device):
        output = model(run.images, None, 0)
        return run.postprocessor(output, [t.orig_size for t in targets], [t.image_id for t in targets])


def judge(run: Run) -> list[Detections]:
    """Detect and note the AP50; return the detections."""
    found = detect(run)
    truth = as_truth(run.targets, run.state.class_names, run.state.category_ids)
    evaluator = CocoEvaluator(truth)
    evaluator.update(found, run.targets)
    run.ap50.append((len(run.losses), evaluator.summarize()["AP50"]))
    return found


def as_truth(targets: list[Target], class_names: list[str], category_ids: list[int]) -> SimpleNamespace:
    """Return what an evaluator needs of a data set, made of these targets alone: reading all annotations takes long."""
    annotations = []
    for target in targets:
        height, width = target.orig_size
        corners = cxcywh_to_xyxy(target.boxes.cpu().float()) * torch.tensor([width, height, width, height])
        areas = target.file_area().tolist()
        for (x0, y0, x1, y1), label, area in zip(corners.tolist(), target.labels.tolist(), areas):
            entry = {"id": len(annotations) + 1, "image_id": target.image_id, "category_id": category_ids[label]}
            annotations.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area, "iscrowd": 0})
    images = [{"id": t.image_id, "height": t.orig_size[0], "width": t.orig_size[1]} for t in targets]
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, class_names) if i >= 0]
    coco = silent_coco({"images": images, "annotations": annotations, "categories": categories})
    ids = [target.image_id for target in targets]
    return SimpleNamespace(coco=coco, image_ids=ids, category_ids=category_ids, class_names=class_names)


def _write(folder: Path, run: Run, before: list[Detections], after: list[Detections]) -> list[Path]:
    """Write the picture and the numbers; return the files."""
    from util.visualize import draw_batch, of_detections, of_target

    names, targets = run.state.class_names, run.targets
    columns = [
        ([f"image {t.image_id}: {len(t)} objects" for t in targets], [of_target(t, names) for t in targets]),
    ]
    for title, detections in (("before", before), (f"after {len(run.losses)} steps", after)):
        boxes = [of_detections(found, target, names, SURE) for found, target in zip(detections, targets)]
        columns.append(([f"{title}: {len(b)} detections, score >= {SURE:g}" for b in boxes], boxes))
    picture = draw_batch(run.images, columns, folder / "overfit.png")
    numbers = {"passed": run.passed, "loss": run.losses, "AP50": run.ap50, "image_ids": [t.image_id for t in targets]}
    (folder / "overfit.json").write_text(json.dumps(numbers) + "\n")
    return [picture, folder / "overfit.json"]
