"""ImageNet weights for Swin: published files, timm's files, and downloads by timm's names."""

import difflib
import math
import os
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbones.weights import find_state_dict, first_process_first, load_exactly, read_state_dict
from util.errors import UserError

if TYPE_CHECKING:
    from models.backbones.swin import SwinTransformer

FILE_SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".tar", ".ckpt", ".safetensors")
HUB_PREFIX = re.compile(r"^(hf[-_]hub:)?timm/")
LIST_COMMAND = "python -c \"import timm; print(timm.list_models('swin_*', pretrained=True))\""


def load_swin_weights(body: "SwinTransformer", weights: str) -> None:
    """Load ImageNet weights: a file in the official or in timm's naming, or the name of weights that timm knows.

    A name, for example `swin_tiny_patch4_window7_224` or `swin_large_patch4_window12_384.ms_in22k`, may begin with
    `timm/`; it is downloaded. Classifier and final norm are left out, the norms of the outputs stay as they are. Bias
    tables of another window size are resized. Raises UserError when anything else does not fit.
    """
    own = body.state_dict()
    last = len(body.layers) - 1
    unused = ("head.", "norm.", f"layers.{last}.downsample.", *(f"layers.{s}." for s in range(last + 1, 4)))
    state = {}
    for name, value in in_published_naming(_read(weights)).items():
        if name.startswith(unused) or name.endswith(("relative_position_index", "attn_mask")):
            continue
        if name.endswith("relative_position_bias_table") and name in own:
            value = resize_bias_table(value, len(own[name]))
        state[name] = value
    fresh = [name for name in own if name.endswith("relative_position_index")]
    fresh += [f"norm{stage}.{part}" for stage in body.out_stages for part in ("weight", "bias")]
    load_exactly(body, state, weights, may_miss=fresh)


def in_published_naming(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with each patch merging at the end of a stage, as published; timm puts it before the next stage.

    Files of timm below 0.9 are as published. The first stage shows which it is: published, it ends with a merging;
    timm's has none before it. Both merge the four cells in the same order, so that no number changes.
    """
    if any(name.startswith("layers.0.downsample.") for name in state):
        return state
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name): value
        for name, value in state.items()
    }


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """Return the bias table (R, heads) for another window size: (`rows`, heads), both (2 window - 1)**2 rows.

    Each head is a square image of offsets (dy, dx), resized by bicubic interpolation; values are not rescaled.
    """
    old, new = math.isqrt(len(table)), math.isqrt(rows)
    if old == new or old * old != len(table):
        return table
    image = table.T.reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image.view(-1, rows).T.contiguous()


def timm_name(weights: str) -> str:
    """Return timm's own name of the Swin weights that `weights` means; raises UserError with near matches for others.

    Only the first version of Swin fits the backbone. Without a tag (`.ms_in22k`), timm's default weights are meant.
    """
    timm = _import_timm()
    name = HUB_PREFIX.sub("", weights)
    name = timm.models.get_deprecated_models().get(name) or name
    family = {"module": "swin_transformer", "pretrained": True}
    known = timm.list_models(**family, include_tags=False) + timm.list_models(**family, include_tags=True)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=4)
    near = near or [entry for entry in known if entry.startswith(name)][:4]
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    found = "timm's model of this name is not a Swin of the first version" if timm.is_model(name) else "no Swin of timm"
    raise UserError(
        f"backbone weights {weights}: no such file, and {found}. {hint}All names: {LIST_COMMAND}. "
        "Check --backbone_weights and --pretrained_backbone_path"
    )


def _read(weights: str) -> dict[str, Tensor]:
    """Return the state dict of a file, or of weights that timm knows."""
    is_path = weights.endswith(FILE_SUFFIXES) or {"/", os.sep} & set(HUB_PREFIX.sub("", weights))
    if is_path or Path(weights).is_file():
        return read_state_dict(weights)
    name = timm_name(weights)
    return first_process_first(lambda: _download(name))


def _download(name: str) -> dict[str, Tensor]:
    """Return weights under timm's name `name`: the authors' file if it can be had, else timm's copy of it.

    The authors' file comes first because torch.hub does not ask the network for what it has, and fails at once.
    """
    source = _import_timm().models.get_pretrained_cfg(name)
    failures = []
    for fetch, address in ((_from_url, source.url), (_from_hugging_face, source.hf_hub_id)):
        try:
            return find_state_dict(fetch(address), address)
        except Exception as error:  # each library has its own kinds, and they change with its version
            failures.append(f"{address}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
    raise UserError(
        f"could not get the ImageNet weights {name} ({'; '.join(failures)}). Download {source.url} elsewhere and put "
        f"it into {Path(torch.hub.get_dir()) / 'checkpoints'}, or give a file with --pretrained_backbone_path PATH, or "
        "start from random weights with --backbone_weights none"
    )


def _from_url(url: str) -> dict:
    return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)


def _from_hugging_face(repository: str) -> dict[str, Tensor]:
    from huggingface_hub import hf_hub_download  # timm needs it, so it is there

    return read_state_dict(hf_hub_download(repository, "model.safetensors"))


def _import_timm() -> ModuleType:
    """Import timm only where a name is given: it takes seconds."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "ImageNet weights of Swin are found with timm: run `pip install timm`, or give a file with "
            "--pretrained_backbone_path PATH, or start from random weights with --backbone_weights none"
        ) from error
    return timm
