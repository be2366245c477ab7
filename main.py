"""Train and evaluate a detector: `python main.py --help`, presets in `configs/`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import ops
from datasets import build_dataset, build_eval_loader, build_train_loader, check_same_categories
from models import build_model
from util import dist
from util.analysis import run_analysis
from util.arg_rules import check_args
from util.args import get_args_parser
from util.checkpoint import brings_backbone, compare_classes, stored_args
from util.commands import chosen_command
from util.compile import prepare
from util.engine import TrainStep, distribute, train_one_epoch
from util.environment import describe_run, effective_batch, plain_args, prepare_output_dir, write_run_files
from util.errors import UserError
from util.evaluation import Evaluation, best_result, build_evaluation, evaluate_checkpoint
from util.infer_args import given_flags
from util.known_errors import explain
from util.logger import RunLog
from util.nonfinite import NonFiniteGuard, skips_on_device
from util.optim import ModelEma, StepSchedule, build_optimizer, drop_epochs, freeze, lr_scale_factor
from util.rng import seed_everything
from util.starting import continues_in, open_checkpoint, start_from
from util.stored_flags import with_flags_of
from util.told_flags import on_eval
from util.train_state import TrainState

__all__ = ["get_args_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if a test failed, 2 after what the user can mend, 130 after Ctrl-C."""
    args = get_args_parser().parse_args(argv)
    if args.infer or args.eval or args.analyse:
        args.given_flags = given_flags(get_args_parser(), argv)  # only what was given wins over the checkpoint
    try:
        check_args(args)
        return run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RuntimeError as error:
        if (known := explain(error, args)) is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        way_on = "; --resume auto goes on from the last checkpoint" if args.output_dir and not args.infer else ""
        print(f"interrupted{way_on}", file=sys.stderr, flush=True)
        return 130
    finally:
        dist.shutdown()


def run(args: Namespace) -> int | None:
    """Build everything, then train, evaluate or analyse; or do what another command says, and return what it does."""
    if (command := chosen_command(args)) is not None:
        return command(args)
    device = dist.init_distributed_mode(args.device, args.local_rank, args.dist_timeout)
    output_dir = prepare_output_dir(args.output_dir)
    try:
        ops.set_backend(args.ops_backend)
    except ValueError as error:
        raise UserError(f"--ops_backend {args.ops_backend}: {error}") from error
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    checkpoint, name = open_checkpoint(args, output_dir)
    if checkpoint is not None and (args.eval or args.analyse):
        args = with_flags_of(args, args.given_flags, checkpoint, name)

    train_set = None if args.eval or args.analyse else build_dataset("train", args)
    val_set = build_dataset("val", args)
    if train_set is not None:
        check_same_categories(train_set, val_set)
    args.num_classes = args.num_classes or val_set.num_classes

    seed_everything(args.seed)
    download = checkpoint is None and not brings_backbone(args.init_from, args.backbone)
    model, criterion, postprocessor = build_parts(args, device, download)
    for line in on_eval(stored_args(checkpoint or {}), vars(args), name) if args.eval or args.analyse else ():
        dist.info(line)
    if checkpoint is not None and (warning := compare_classes(checkpoint, val_set.class_names)):
        dist.info(warning)
    if checkpoint is None and args.init_from:
        start_from(args, model, val_set.class_names)
    freeze(model, args.freeze)
    describe_run(args, device, model, train_set, val_set)
    if output_dir is not None:
        write_run_files(args, output_dir)

    shared = {"num_workers": args.num_workers, "rank": dist.rank(), "world_size": dist.world_size()}
    shared["pin_memory"] = device.type == "cuda"
    eval_loader = build_eval_loader(val_set, batch_size=args.eval_batch_size, **shared)
    evaluation = build_evaluation(args, eval_loader, criterion, postprocessor, device, output_dir)
    if args.analyse:
        run_analysis(args, model, criterion, evaluation.loader, device, checkpoint, output_dir)
    elif args.eval:
        evaluate_checkpoint(args, evaluation, model, checkpoint, name)
    else:
        cache = {"cache_mode": args.cache_mode, "local_rank": dist.local_rank(), "local_size": dist.local_world_size()}
        loader = build_train_loader(train_set, batch_size=args.batch_size, seed=args.seed, **shared, **cache)
        state = build_state(args, model, criterion, device, val_set)
        seed_everything(args.seed + dist.rank())  # dropout differs between processes; the weights did not
        if checkpoint is None:
            state.start_at(args.start_epoch)
        else:
            state.resume(checkpoint, name, args.start_epoch)
        train(args, evaluation, state, loader, here=continues_in(output_dir, name))
    dist.info(f"outputs are in {output_dir}" if output_dir else "nothing was saved: there is no --output_dir")


def build_parts(args: Namespace, device: torch.device, download: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return detector, criterion and post-processor; without `download` a checkpoint will fill the backbone."""
    if not download and args.backbone_weights != "none":
        args = Namespace(**{**vars(args), "backbone_weights": "checkpoint"})
    model, criterion, postprocessor = build_model(args)
    model = prepare(model.to(device), channels_last=args.channels_last, compiled=args.compile)
    return model, criterion.to(device), postprocessor


def build_state(args: Namespace, model: nn.Module, criterion: nn.Module, device: torch.device, dataset) -> TrainState:
    """Return the optimiser, the schedule and the rest of what changes while training."""
    factor = lr_scale_factor(args.lr_scale, effective_batch(args), args.recipe_batch_size)
    optimizer = build_optimizer(args, model, criterion, factor)
    drops = drop_epochs(args.lr_drop, args.lr_drop_epochs, args.epochs)
    return TrainState(
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=StepSchedule(optimizer, drops, args.warmup_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp == "fp16"),
        ema=ModelEma(model, args.ema_decay) if args.use_ema else None,
        args=plain_args(args),
        class_names=dataset.class_names,
        category_ids=dataset.category_ids,
    )


def train(args: Namespace, evaluation: Evaluation, state: TrainState, loader: DataLoader, here: bool) -> None:
    """Train the epochs that are left; each is trained, saved, evaluated and logged, in this order.

    `here` says that the run continues in the folder of its checkpoint, where a stop may have cost an evaluation.
    """
    output_dir = evaluation.output_dir
    train_step = distribute(TrainStep(state.model, state.criterion), evaluation.device, args.find_unused_params)
    guard = NonFiniteGuard(output_dir, args.max_nonfinite, deferred=skips_on_device(state.optimizer))
    log = RunLog(output_dir, tensorboard=args.tensorboard)
    logged = [entry for entry in log.entries() if entry["epoch"] <= state.epoch]
    state.best = best_result(logged, state.best)
    if here and state.train_stats and not state.step and state.epoch not in [entry["epoch"] for entry in logged]:
        finish_epoch(args, evaluation, state, log)  # the run was stopped after saving and before evaluating
    if state.epoch + 1 >= args.epochs:
        dist.info(f"nothing left to do: epoch {state.epoch} of {args.epochs} is done, counted from 0; raise --epochs")
    while state.epoch + 1 < args.epochs:
        loader.batch_sampler.set_epoch(state.epoch + 1, start_batch=state.step)
        save = (lambda: state.save(output_dir / "checkpoint.pth")) if output_dir else None
        stats = train_one_epoch(train_step, loader, state, evaluation.settings, guard, evaluation.device, save)
        state.finish_epoch(stats)
        if output_dir is not None:
            done = state.epoch + 1
            numbered = done % args.save_every == 0 or done in state.schedule.drops
            names = ["checkpoint.pth"] + [f"checkpoint{state.epoch:04}.pth"] * numbered
            state.save(*(output_dir / name for name in names))
        finish_epoch(args, evaluation, state, log)
    log.close()
    if output_dir is not None and dist.is_main():
        draw_curves(output_dir)


def finish_epoch(args: Namespace, evaluation: Evaluation, state: TrainState, log: RunLog) -> None:
    """Evaluate if it is time, write the line of the log, keep the best weights."""
    entry: dict[str, Any] = {f"train_{name}": value for name, value in state.train_stats.items()}
    done = state.epoch + 1
    last = done >= args.epochs
    if done % args.eval_every == 0 or last:
        entry |= evaluation.run(state.model, state.ema, state.epoch, last=last)
    entry |= {"epoch": state.epoch, "n_parameters": count_parameters(state.model)}
    best = best_result([entry], state.best)
    if best != state.best:
        state.best = best
        if evaluation.output_dir is not None:
            state.save_weights(evaluation.output_dir / "checkpoint_best.pth")
    log.write(entry)


def draw_curves(output_dir: Path) -> None:
    """Draw the curves of `log.txt` if matplotlib is installed."""
    from util.plot import plot_run

    try:
        dist.info(f"curves: {', '.join(str(path) for path in plot_run(output_dir))}")
    except UserError as error:
        dist.info(f"no curves: {error}")


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


if __name__ == "__main__":
    sys.exit(main())
