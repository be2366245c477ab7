"""Evaluations of a run: which weights, which files, which numbers."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets.eval_backends import find_backend
from datasets.evaluators import CocoEvaluator
from util import dist
from util.assignments import Assignments
from util.checkpoint import load_criterion, load_weights
from util.correspondence import Correspondences
from util.engine import StepSettings, evaluate
from util.errors import UserError
from util.eval_curves import eval_curves, write_eval_curves
from util.flips import Flips
from util.optim import ModelEma

KEEP_ARRAYS_EVERY = 50  # epochs between numbered files of precision-recall arrays, as in the family
DRAW_ABOVE = 0.3  # score of a drawn detection


@dataclass
class Evaluation:
    """Evaluates weights on the validation images and writes what comes out."""

    loader: DataLoader
    criterion: nn.Module | None  # None: no losses
    postprocessor: nn.Module
    settings: StepSettings
    device: torch.device
    output_dir: Path | None
    topk: int = 100
    evaluator: str = "auto"
    draw: int = 8  # images drawn
    curves: bool = False  # precision-recall curves and confusion matrix of the last evaluation
    confusion_score: float | None = None  # threshold of that matrix; None: the one of the best mean F1
    correspondences: Correspondences | None = None  # what a learned matcher makes of some images
    assignments: Assignments | None = None  # which queries learn which objects of some images
    flips: dict[str, Flips] = field(default_factory=dict)  # of the weights and of their average

    def __post_init__(self) -> None:
        find_backend(self.evaluator)  # a package that is missing is better told now than after an epoch

    @cached_property
    def _collector(self) -> CocoEvaluator:
        """Made for the first evaluation and used for all: it reads and converts the ground truth."""
        return CocoEvaluator(self.loader.dataset, topk=self.topk, implementation=self.evaluator)

    def run(
        self, model: nn.Module, ema: ModelEma | None, epoch: int, *, final: bool = False, last: bool = False
    ) -> dict[str, Any]:
        """Evaluate the weights, and their average if there is one.

        Args:
            final: an evaluation of its own (`--eval`), not one of a training run; other file names.
            last: of a training run; as after `final`, its curves are drawn.

        Returns:
            Log entries `test_*` and, of the average, `ema_test_*`.
        """
        curves = self.curves and (final or last)
        entry = self._one(model, "test_", epoch, self._arrays(epoch, final), curves)
        if self.correspondences is not None:
            self.correspondences.finish(epoch, self.output_dir / f"correspondence{'_eval' * final}")
        if self.assignments is not None:
            folder = self.output_dir / f"assignment{'_eval' * final}"
            self.assignments.finish(model, epoch, folder, self.device, self.settings.autocast(self.device))
        if ema is not None:
            entry.update(self._one(ema.module, "ema_test_", epoch, [], curves))
        return entry

    def _arrays(self, epoch: int, final: bool) -> list[str]:
        if final:
            return ["eval.pth"]
        return ["eval/latest.pth"] + [f"eval/{epoch:03}.pth"] * (epoch % KEEP_ARRAYS_EVERY == 0)

    def _one(self, model: nn.Module, prefix: str, epoch: int, arrays: list[str], curves: bool) -> dict[str, Any]:
        dataset = self.loader.dataset
        dist.broadcast_buffers(model)  # what a checkpoint holds is what is evaluated
        evaluator = self._collector
        evaluator.reset()
        stats, first = evaluate(
            model,
            self.criterion,
            self.postprocessor,
            self.loader,
            evaluator,
            self.settings,
            self.device,
            epoch=epoch,
            keep=self.draw,
            flips=self.flips.setdefault(prefix, Flips()),
            correspondences=self.correspondences if prefix == "test_" else None,
        )
        dist.info(evaluator.table())
        shown = (f"{100 * n:.1f}" if n >= 0 else "-" for n in stats["coco_eval_bbox"])  # -1: there is no object
        dist.info(f"{prefix}AP {next(shown)}  AP50 {next(shown)}  AP75 {next(shown)}")
        if self.output_dir is not None and dist.is_main():
            folder = self.output_dir / ("eval" if prefix == "test_" else "eval_ema")
            evaluator.save(folder)
            (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")
            for name in arrays:
                evaluator.save_eval(self.output_dir / name)
            if curves:
                dist.info(write_eval_curves(eval_curves(evaluator, self.confusion_score), folder))
            if self.draw:
                from util.visualize import draw_detections

                pictures = self.output_dir / ("pictures" if prefix == "test_" else "pictures_ema")
                draw_detections(dataset, first, pictures, limit=self.draw, score_threshold=DRAW_ABOVE)
        return {prefix + name: value for name, value in stats.items()}


def best_result(entries: Iterable[Mapping[str, Any]], best: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return {"ap", "epoch", "weights"} of the best AP in log entries if it beats `best`, else `best`."""
    for entry in entries:
        for prefix, weights in (("test_", "model"), ("ema_test_", "ema")):
            numbers = entry.get(prefix + "coco_eval_bbox")
            if numbers and (best is None or numbers[0] > best["ap"]):
                best = {"ap": numbers[0], "epoch": entry["epoch"], "weights": weights}
    return best


def build_evaluation(
    args: Namespace,
    loader: DataLoader,
    criterion: nn.Module,
    postprocessor: nn.Module,
    device: torch.device,
    output_dir: Path | None,
) -> Evaluation:
    """Return what evaluates the images of `loader`, in training and with `--eval`."""
    settings = StepSettings(args.amp, args.grad_accum_steps, args.clip_max_norm, args.print_freq, args.save_steps)
    watched = args.plot_correspondence
    return Evaluation(
        loader=loader,
        criterion=criterion if args.eval_loss else None,
        postprocessor=postprocessor,
        settings=settings,
        device=device,
        output_dir=output_dir,
        topk=args.topk,
        evaluator=args.evaluator,
        draw=args.draw,
        curves=args.eval_curves,
        confusion_score=args.confusion_score,
        correspondences=Correspondences(criterion, loader.dataset, watched) if watched else None,
        assignments=Assignments(criterion, loader.dataset, args.plot_assignment) if args.plot_assignment else None,
    )


def evaluate_checkpoint(
    args: Namespace, evaluation: Evaluation, model: nn.Module, content: Mapping[str, Any], name: str
) -> None:
    """Evaluate the weights of a file, and its averaged weights with `--use_ema`."""
    for line in load_weights(model, content, name=name).lines:
        dist.info(f"{name}: {line}")
    if evaluation.criterion is not None and not load_criterion(evaluation.criterion, content, name):
        dist.info(f"{name} holds no learned matcher: evaluated without losses")
        evaluation.criterion = None
    watched = evaluation.correspondences or evaluation.assignments
    if watched is not None and not load_criterion(watched.criterion, content, name):
        raise UserError(
            f"{watched.flag}: {name} holds no learned matcher; give a checkpoint of the training, not one of "
            "weights only as checkpoint_best.pth"
        )
    ema = ModelEma(model, args.ema_decay) if args.use_ema else None
    if ema is not None:
        if "ema" not in content:
            raise UserError(f"--use_ema: {name} holds no averaged weights; leave --use_ema out")
        load_weights(ema.module, content["ema"]["model"], name=name)
    evaluation.run(model, ema, content.get("epoch", 0), final=True)
