"""Files with weights: read them safely, write them so that a killed run leaves no broken one, load them."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from util import dist
from util.class_rows import common_classes, copy_rows, is_class_head, published_names
from util.convert import QUERY_TABLES, find_weights, fit_to_model, to_native
from util.convert_mmdet import class_names as mmdet_class_names
from util.errors import UserError
from util.misfit import LoadReport, advise, describe, group_names

TEMPORARY = ".tmp"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint, tensors on the CPU.

    Only tensors and plain Python are unpickled; the one class allowed is `argparse.Namespace`, which published files
    hold under `args`. An https address is downloaded once per machine, into the cache of torch.hub.

    Raises:
        UserError: no such file, not a checkpoint, or one cut off by a killed program.
    """
    source = str(path)
    if source.startswith(("https://", "http://")):
        path = _download(source)
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"checkpoint {source} {kind}; {_other_files(path)}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise UserError(_broken(path, error)) from error
        raise UserError(
            f"checkpoint {source} holds the class {found.group(1)}, which is not loaded for safety. If you trust the "
            "file, load it once with torch.load(..., weights_only=False), where the package of that class is "
            "installed, and save its weights alone (the entry `model`, in files of mmdet `state_dict`)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(_broken(path, error)) from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {source} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _broken(path: Path, error: Exception) -> str:
    reason = "" if isinstance(error, pickle.UnpicklingError) else (str(error).splitlines() or [""])[0][:120]
    reason = f": {reason}" if reason else ""  # that of unpickling tells of switches of torch.load, which do not help
    size = path.stat().st_size
    return (
        f"checkpoint {path} ({size} bytes) cannot be read, it is cut off or no checkpoint at all "
        f"({type(error).__name__}{reason}); {_other_files(path)}"
    )


def _other_files(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    others = sorted(p.name for p in folder.glob("*.pth") if p != path) if folder.is_dir() else []
    return f"use another file of {folder}: {', '.join(others)}" if others else f"{folder} has no other .pth file"


def _download(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    # Files of different addresses may have the same name.
    key = hashlib.sha256(url.encode()).hexdigest()[:8]
    target = folder / f"{key}_{Path(urlparse(url).path).name}"
    with dist.local_main_first():
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(target))
            except OSError as error:
                raise UserError(f"cannot download {url}: {error}. Download it by hand and give its path") from error
    return target


def write_atomically(content: Mapping[str, Any], path: Path) -> None:
    """Write `content` so that `path` is at every moment either the old file or the whole new one.

    Raises:
        UserError: the disk is full or the folder is gone.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # else the new name may survive a power cut and the data not
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error}. Is the disk full? The previous file, if there was one, is untouched"
        ) from error


def remove_stale(folder: Path) -> list[str]:
    """Delete what killed runs left half written in `folder`; return the names."""
    stale = sorted(folder.glob(f"*.pth{TEMPORARY}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return [path.name for path in stale]


def stored_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command line inside a checkpoint, ours or a published one; empty if there is none."""
    args = content.get("args") or {}
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args)


def compare_classes(content: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """Return a warning if a checkpoint that says its classes was trained on others, else an empty string."""
    theirs = stored_class_names(content)
    if theirs is None or theirs == list(class_names):
        return ""
    shown = [(a, b) for a, b in zip_longest(theirs, class_names, fillvalue="nothing") if a != b]
    return (
        f"warning: {len(shown)} classes of the checkpoint have other names in these annotations, for example "
        f"{shown[0][0]!r} is {shown[0][1]!r} here; results will be wrong unless the order is the same"
    )


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], strict: bool = True, name: str = ""
) -> LoadReport:
    """Load the weights of any published or own file into `model`.

    Args:
        source: path, https address, content of a checkpoint, or a state dict; wrappers and second names are handled
            by `util.convert`.
        strict: raise if anything is missing, left over or of another shape; else load what fits.
        name: of the source in messages, when it is not a path.

    Returns:
        What was loaded and what was not.

    Raises:
        UserError: no weights in the file, or (strict) they do not fit; names flags that would help.
    """
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    name = name or ("the given state" if isinstance(source, Mapping) else str(source))
    own, native = model.state_dict(), native_weights(content, name)
    state, lines = fit_to_model(native, own, shared_names(model), list(getattr(model, "groups", ())))
    report = LoadReport(lines=lines)
    report.reshaped = {
        n: (tuple(v.shape), tuple(own[n].shape)) for n, v in state.items() if n in own and v.shape != own[n].shape
    }
    report.missing = [n for n in own if n not in state and own[n].is_floating_point()]  # integer ones are computed
    report.unexpected = [n for n in state if n not in own]
    fitting = {n: v for n, v in state.items() if n in own and n not in report.reshaped}
    report.loaded = list(fitting)
    if not report.fits:
        report.advice = advise(native, own, stored_args(content))
        if strict:
            raise UserError(f"checkpoint {name} is of another model\n{report.text()}")
    model.load_state_dict(fitting, strict=False)
    return report


def load_criterion(criterion: nn.Module, content: Mapping[str, Any], name: str) -> bool:
    """Load what a learned matcher knows; False if there is one and the file holds nothing for it.

    Args:
        content: of a checkpoint.
        name: of the file, for messages.

    Raises:
        UserError: the file holds another matcher.
    """
    if not criterion.state_dict():
        return True
    if "criterion" not in content:
        return False
    try:
        criterion.load_state_dict(content["criterion"])
    except RuntimeError as error:
        raise UserError(
            f"checkpoint {name} was trained with another matcher: use its --matcher, --enc_matcher, --probe_logits, "
            "--box_code, --key_box and --probe_per_layer, and with the latter its --no_aux_loss "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error
    return True


def native_weights(content: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the weights in the content of a file under our names; UserError if there are none or none of ours."""
    weights = find_weights(content)
    if weights is None:
        raise UserError(
            f"checkpoint {name}: no weights found; expected tensors, or `model` or `state_dict` with tensors"
        )
    try:
        return to_native(weights)
    except UserError as error:
        raise UserError(f"checkpoint {name}: {error}") from error


def stored_class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Return the class names by class index inside a checkpoint, ours or a published one; None if there are none."""
    names = content.get("class_names") or mmdet_class_names(content)
    return list(names) if names else None


def shared_names(model: nn.Module) -> list[list[str]]:
    """Return the names of every tensor of `model` that has more than one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def brings_backbone(path: str, backbone: str) -> bool:
    """Say whether the file of `--init_from` has the weights of this `--backbone`: then ImageNet's need no download."""
    return bool(path) and describe(native_weights(read_checkpoint(path), path))["backbone"] == backbone


def init_from(
    model: nn.Module, path: str, class_names: Sequence[str], copy_class_rows: bool = False
) -> tuple[LoadReport, list[str]]:
    """Start from the weights of another run: take what fits, keep the initial values elsewhere.

    Rows of another shape that mean the same in both models are taken too: the file's rows of a query table with more
    rows here, and in class heads those that stand for no class (`util.class_rows.copy_rows`).

    Args:
        class_names: of this run, by class index.
        copy_class_rows: also take, in the class heads, the rows of classes that have the same name in both.

    Returns:
        The report of loading and the names of the classes whose rows were copied.
    """
    content = read_checkpoint(path)
    state = native_weights(content, path)
    heads = {name: value for name, value in state.items() if is_class_head(name)}
    common: list[tuple[int, int]] = []
    if copy_class_rows:
        theirs = stored_class_names(content) or published_names(state)
        if theirs is None:
            raise UserError(
                f"--init_class_rows: {path} does not say its class names, nor has it 91 or 80 as COCO's files"
            )
        common = common_classes(class_names, theirs)
        state = {name: value for name, value in state.items() if name not in heads}
    report = load_weights(model, state, strict=False)
    _copy_queries(model, state, report)
    done = [
        "--init_from",
        "--dn_labelbook_size",
        "label embeddings",
    ]  # other classes: right for --resume, and here what is wanted
    if not any(name in report.reshaped for name in QUERY_TABLES):
        done.append("--num_queries_one2one")
    report.advice = [line for line in report.advice if not any(flag in line for flag in done)]
    own = model.state_dict()
    if copy_class_rows:
        report.missing = [n for n in report.missing if n not in heads]
        for name, value in heads.items():
            if name in own and own[name].shape[1:] != value.shape[1:]:  # another width: no row fits
                report.reshaped[name] = tuple(value.shape), tuple(own[name].shape)
    else:
        heads = {name: value for name, value in heads.items() if name in report.reshaped}
    kept = [name for name in copy_rows(model, heads, common) if not name.startswith("transformer.")]  # second names
    if kept:
        report.lines.append(f"rows that stand for no class were taken: {', '.join(group_names(kept))}")
    return report, [class_names[i] for i, _ in common]


@torch.no_grad()
def _copy_queries(model: nn.Module, state: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy the rows of a query table that has more rows in the model; `load_weights` does the opposite case."""
    own = model.state_dict()
    for name in QUERY_TABLES:
        if name in report.reshaped and own[name].shape[1:] == state[name].shape[1:]:
            rows = len(state[name])
            own[name][:rows] = state[name]
            del report.reshaped[name]
            report.lines.append(f"{name}: the first {rows} of {len(own[name])} rows are the file's")
