"""Reading files of backbone weights."""

import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors by name in the file `path`, given as --backbone_weights or --pretrained_backbone_path.

    The file is a `.safetensors` file, or one of torch.save with what `find_state_dict` understands. Only tensors and
    `argparse.Namespace` (timm's training checkpoints hold one) are unpickled, never code. Raises UserError.
    """
    if not Path(path).is_file():
        raise UserError(
            f"backbone weights {path}: no such file. Check --backbone_weights and --pretrained_backbone_path, or leave "
            "both out to download ImageNet weights, or start from random weights with --backbone_weights none (as when "
            "a whole checkpoint is loaded afterwards)"
        )
    if Path(path).suffix == ".safetensors":
        return find_state_dict(_read_safetensors(path), str(path))
    try:
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"backbone weights {path}: not a file of plain tensors written by torch.save ({type(error).__name__}). If "
            "you trust the file, load it once with torch.load(..., weights_only=False) and save its state dict alone"
        ) from error
    return find_state_dict(content, str(path))


def find_state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """Return the state dict that `content` is, or holds under `state_dict` or `model`.

    A prefix `module.` (left by DistributedDataParallel) is removed. `source` tells the user where `content` is from.
    Raises UserError.
    """
    for entry in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise UserError(f"backbone weights {source}: expected a state dict, or one under `state_dict` or `model`")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str, may_miss: Collection[str]) -> None:
    """Load `state` into `module`; the names in `may_miss` keep the module's value when `state` lacks them.

    `source` tells the user where `state` is from. Raises UserError that names it when anything else is missing, left
    over, or of another shape.
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state and name not in may_miss],
        "unknown": [name for name in state if name not in own],
        "other shape": [
            f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
            for name, value in state.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    report = [f"{kind}: {len(names)}, for example {', '.join(names[:3])}" for kind, names in problems.items() if names]
    if report:
        raise UserError(
            f"backbone weights {source} do not fit the backbone ({'; '.join(report)}). Check --backbone and the file"
        )
    module.load_state_dict(state, strict=False)


def first_process_first(fetch: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `fetch()`, a download into a cache; in a distributed run one process per machine calls it before all."""
    if not (dist.is_available() and dist.is_initialized()):
        return fetch()
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0
    try:
        state = fetch() if first else None
    finally:
        dist.barrier()  # reached also after a failure, so that the other processes report it instead of waiting
    return state if first else fetch()


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"backbone weights {path}: run `pip install safetensors` to read this file") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"backbone weights {path}: not a safetensors file, or an incomplete one ({error})") from error
