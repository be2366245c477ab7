"""What a trained detector looks at: `main.py --analyse NAME --resume CHECKPOINT --output_dir FOLDER`.

*Adding an analysis is adding a file here* and a line to `ANALYSES`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from util import dist
from util.analysis.attention_pictures import analyse_attention, attention_options
from util.analysis.base import Subject
from util.analysis.conflict import analyse_conflict
from util.analysis.discriminability import analyse_discriminability
from util.checkpoint import load_criterion, load_weights
from util.errors import UserError

__all__ = ["ANALYSES", "Subject", "run_analysis"]

ANALYSES: dict[str, Callable[[Subject], list[Path]]] = {
    "discriminability": analyse_discriminability,
    "conflict": analyse_conflict,
    "attention": analyse_attention,
}
NO_PAIRS = ("attention",)  # they ask no matcher, so they work with weights alone


def run_analysis(
    args: Namespace,
    model: nn.Module,
    criterion: nn.Module,
    loader: DataLoader,
    device: torch.device,
    content: Mapping[str, Any],
    folder: Path,
) -> None:
    """Run `--analyse` on the weights in `content` and say which files it wrote.

    Args:
        model: with everything that training has.
        loader: of the validation images.
        folder: for the results.

    Raises:
        UserError: the run has several processes, or the weights do not fit.
    """
    if dist.is_distributed():
        raise UserError("--analyse runs in one process: start it without a launcher")
    for line in load_weights(model, content, name=args.resume).lines:
        dist.info(f"{args.resume}: {line}")
    if args.analyse not in NO_PAIRS and not load_criterion(criterion, content, args.resume):
        raise UserError(f"--analyse: {args.resume} holds no learned matcher, which tells the positive queries")
    others = [Path(name) for name in args.analyse_with]
    if missing := [path for path in others if not path.is_file()]:
        raise UserError(f"--analyse_with: {missing[0]} does not exist; give .json files of the same analysis")
    subject = Subject(
        model=model,
        criterion=criterion,
        loader=loader,
        device=device,
        folder=folder,
        label=args.analyse_label or Path(args.resume).resolve().parent.name,
        others=others,
        print_freq=args.print_freq,
        attention=attention_options(args),
    )
    for path in ANALYSES[args.analyse](subject):
        dist.info(f"wrote {path}")
