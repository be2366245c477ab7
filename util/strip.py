"""Checkpoints for inference: without optimiser, and without the parts that only training needs (`main.py --strip`)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from util import dist
from util.checkpoint import native_weights, read_checkpoint, stored_args, stored_class_names, write_atomically
from util.convert import GROUPS, PUBLISHED, QUERY_TABLES
from util.errors import UserError

SUFFIX = "_inference"
KEPT = ("format", "epoch", "args", "best", "category_ids")


def strip_command(args: Namespace) -> None:
    """Run `main.py --strip CHECKPOINT [--use_ema]`."""
    strip_file(args.strip, averaged=args.use_ema)


def strip_file(source: str, *, averaged: bool = False) -> Path:
    """Write `NAME_inference.pth` beside the checkpoint NAME.pth and say what was left out.

    With `main.py --eval` the new file gives the same detections, with the flags of the training or without those of its
    schemes.

    Args:
        source: path or https address (then the file goes into the working folder) of our or a published checkpoint.
        averaged: take the averaged weights in place of the others.

    Returns:
        the path of the new file.

    Raises:
        UserError: no such file, no weights in it, or no averaged ones.
    """
    content = read_checkpoint(source)
    path = Path(Path(source).name) if source.startswith(("https://", "http://")) else Path(source)
    target = path.with_name(f"{path.stem}{SUFFIX}.pth")
    result, gone = strip(content, source, averaged=averaged)
    write_atomically(result, target)
    dist.info(f"{source}: left out {', '.join(gone) or 'nothing'}")
    if "ema" in content and not averaged:
        dist.info(f"{source} holds averaged weights too: --use_ema takes those")
    before = f", was {_megabytes(path)}" if path.is_file() else ""
    dist.info(f"wrote {target}, {_megabytes(target)}{before}")
    return target


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.1f} MiB"


def strip(content: Mapping[str, Any], name: str, *, averaged: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Return the content of a file for inference and what is not in it any more.

    Args:
        content: of the checkpoint `name`, ours or a published one.
        averaged: take the averaged weights.
    """
    if averaged and not isinstance(content.get("ema"), Mapping):
        raise UserError(f"--use_ema: {name} holds no averaged weights; leave --use_ema out")
    weights = native_weights(content["ema"]["model"] if averaged else content, name)
    args = stored_args(content)
    kept, gone = _for_inference(weights, args)
    result = {key: content[key] for key in KEPT if key in content}
    gone += [key for key in content if key in ("optimizer", "lr_scheduler", "scaler", "ema", "criterion")]
    if names := stored_class_names(content):
        result["class_names"] = names
    if args:
        result["args"] = args
    return result | {"model": kept}, gone


def _for_inference(weights: Mapping[str, Tensor], args: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights without the schemes' parts and without the rows of training-only queries."""
    kept = {name: value for name, value in weights.items() if not name.startswith((GROUPS, *PUBLISHED))}
    gone = sorted({".".join(name.split(".")[:2]) + ".*" for name in weights if name.startswith(GROUPS)})
    gone += [f"{part}*" for part in PUBLISHED if any(name.startswith(part) for name in weights)]
    rows = args.get("num_queries_one2one")
    for name in QUERY_TABLES:
        table = kept.get(name)
        if table is not None and rows is not None and rows < len(table):
            kept[name] = table[:rows].clone()  # a view would be saved with all rows
            gone.append(f"{len(table) - rows} rows of {name}")
    return kept, gone
