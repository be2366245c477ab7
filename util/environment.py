"""What surrounds a run: its output folder, the versions it ran with, its own record of the command line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ops
from util import dist
from util.checkpoint import remove_stale
from util.errors import UserError
from util.optim import lr_scale_factor

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pycocotools", "faster-coco-eval", "hotcoco", "timm", "pillow")


def prepare_output_dir(name: str) -> Path | None:
    """Return the output folder, made and tried out; None if `name` is empty.

    Half-written files of killed runs are removed.

    Raises:
        UserError: it cannot be made or written to.
    """
    if not name:
        return None
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable_{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise UserError(f"--output_dir {name}: cannot write there ({reason}); give another folder") from error
    if dist.is_main():
        for stale in remove_stale(folder):
            dist.info(f"removed {folder / stale}, left half written by a killed run")
    return folder


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of all flags as a dictionary that JSON and checkpoints can hold."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items() if name != "given_flags"}))


def write_run_files(args: argparse.Namespace, folder: Path) -> None:
    """Write `args.json` (`eval_args.json`, `analyse_args.json`) and append to `env.txt`, main process only."""
    if not dist.is_main():
        return
    what = "eval_" if args.eval else "analyse_" if args.analyse else ""  # in the folder of a run its record is kept
    name = f"{what}args.json"
    (folder / name).write_text(json.dumps(plain_args(args), indent=2) + "\n")
    with (folder / "env.txt").open("a") as file:  # one block per start: a resumed run has several
        file.write("\n".join(environment()) + "\n\n")


def environment() -> list[str]:
    """Return lines about the command, the code and the versions."""
    lines = [f"command: {shlex.join([sys.executable, *sys.argv])}", f"git: {git_version()}"]
    lines += [f"python: {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name}: {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name}: not installed")
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        lines.append(f"cuda: {torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(sorted(names))}")
    return lines


def git_version() -> str:
    """Return the commit of this code, with a mark if files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.strip() + (" with local changes" if changes.strip() else "")


def effective_batch(args: argparse.Namespace) -> int:
    """Return the number of images per optimiser step over all processes."""
    return dist.world_size() * args.batch_size * args.grad_accum_steps


def describe_run(args: argparse.Namespace, device: torch.device, model: nn.Module, train_set, val_set) -> None:
    """Print what is about to run: device, parameters, data, batch; `train_set` may be None."""
    dist.info(f"device {device}, deformable attention by {ops.active_backend(device)}, {dist.world_size()} process(es)")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    dist.info(f"{trained} trainable parameters" + (f"; frozen: {' '.join(args.freeze)}" if args.freeze else ""))
    sets = [(name, data) for name, data in (("training", train_set), ("validation", val_set)) if data is not None]
    names = [name for name in val_set.class_names if name != "N/A"]
    dist.info(
        f"{' and '.join(f'{len(data)} {name}' for name, data in sets)} images; {len(names)} classes in "
        f"{args.num_classes} outputs: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    )
    # Neither the squares of lsj nor the images of the synthetic set, all of one size, are padded.
    if args.eval_batch_size > 1 and args.augment != "lsj" and args.dataset_file != "synthetic":
        dist.info(
            f"note: --eval_batch_size {args.eval_batch_size} pads images to one size, which changes detections a "
            "little; for AP that is compared with others give 1"
        )
    if train_set is None:
        return
    batch, recipe = effective_batch(args), args.recipe_batch_size
    dist.info(f"batch {batch} = {dist.world_size()} process(es) x {args.batch_size} x {args.grad_accum_steps} steps")
    if batch != recipe:
        factors = {rule: lr_scale_factor(rule, batch, recipe) for rule in ("none", "sqrt", "linear")}
        choices = ", ".join(f"{rule} x{factor:.3g}" for rule, factor in factors.items())
        dist.info(
            f"warning: the recipe assumes batch {recipe} (--recipe_batch_size); --lr_scale would multiply all rates by "
            f"{choices}; it is {args.lr_scale}"
        )
