"""What a run starts from: the file of `--resume`, or the weights of `--init_from`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from util import dist
from util.checkpoint import init_from, read_checkpoint
from util.errors import UserError


def open_checkpoint(args: Namespace, output_dir: Path | None) -> tuple[dict[str, Any] | None, str]:
    """Return content and name of the file that `--resume` means, (None, "") if there is none to resume."""
    name = args.resume
    if name == "auto":
        latest = output_dir / "checkpoint.pth"
        if (args.eval or args.analyse) and not latest.is_file():
            raise UserError(f"--resume auto: there is no {latest}")
        name = str(latest) if latest.is_file() else ""
        dist.info(f"--resume auto: {name or 'no checkpoint.pth yet, this is a new run'}")
    return (read_checkpoint(name), name) if name else (None, "")


def continues_in(output_dir: Path | None, name: str) -> bool:
    """Say whether the checkpoint `name` lies in the folder of this run."""
    return bool(name) and output_dir is not None and Path(name).resolve().parent == output_dir.resolve()


def start_from(args: Namespace, model: nn.Module, class_names: Sequence[str]) -> None:
    """Load `--init_from` and say what of it was used."""
    report, copied = init_from(model, args.init_from, class_names, args.init_class_rows)
    dist.info(f"--init_from {args.init_from}: took {len(report.loaded)} tensors, the rest keeps its initial values")
    for line in [*report.lines, *report.text().splitlines()]:
        dist.info(f"  {line}")
    if args.init_class_rows:
        dist.info(f"class rows copied by name: {', '.join(copied) or 'none, no class has the same name in both'}")
