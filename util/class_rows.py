"""Which rows of a weight belong to which class: what a run with other classes takes from the heads of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

# Tensors with a row per class, in the order of the classes; `label_enc` and `fc_cls` have more rows after those.
PER_CLASS = re.compile(
    r"((^|\.)class_embed\.\d+|enc_out_class_embed|\.atss_cls|\.conv_cls|\.gfl_cls|\.roi\.fc_cls)\.(weight|bias)$"
    r"|^label_enc\.weight$"
)
ANCHORS = re.compile(r"\.retina_cls\.(weight|bias)$")  # rows anchor by anchor, in each the classes
BOXES = re.compile(r"\.roi\.fc_reg\.(weight|bias)$")  # four rows per class
BACKGROUND = re.compile(r"\.roi\.fc_cls\.(weight|bias)$")  # its last row is "no object"


def is_class_head(name: str) -> bool:
    """Say whether the rows of a tensor belong to classes."""
    return any(pattern.search(name) for pattern in (PER_CLASS, ANCHORS, BOXES))


def published_names(state: Mapping[str, Tensor]) -> Sequence[str] | None:
    """Return the names behind the 91 rows of published COCO files, or the 80 in the order of their ids."""
    from datasets.coco_names import COCO_NAMES

    rows = state["class_embed.0.weight"].shape[0] if "class_embed.0.weight" in state else 0
    if rows == len(COCO_NAMES):
        return [name for _, name in sorted(COCO_NAMES.items())]
    return [COCO_NAMES.get(i, "N/A") for i in range(91)] if rows == 91 else None


def common_classes(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, int]]:
    """Return the class indices, ours and theirs, of equal names.

    A name that is not there to the letter is looked for without regard to capitals, `_` and `-`. "N/A" is no class: it
    fills the holes between the category ids of COCO.
    """

    def plain(name: str) -> str:
        return name.casefold().replace("_", " ").replace("-", " ")

    known = {name: i for i, name in enumerate(theirs) if name != "N/A"}
    loosely = {plain(name): i for name, i in known.items()}
    found = ((i, known.get(name, loosely.get(plain(name)))) for i, name in enumerate(ours) if name != "N/A")
    return [(i, j) for i, j in found if j is not None]


@torch.no_grad()
def copy_rows(model: nn.Module, heads: Mapping[str, Tensor], common: Sequence[tuple[int, int]]) -> list[str]:
    """Copy the rows of common classes, and those that stand for no class; return the names with the latter.

    No class has a row in two places: "object", row 0 of the encoder's head of two stages, which ranks the proposals;
    and "no object", the last row of the box head of Faster R-CNN.

    Args:
        model: takes the rows.
        heads: native names of tensors of a file; those that the model does not have or has in another width are
            passed over.
        common: class index of the model and of the file, for every class that both have.
    """
    own = dict(model.state_dict(keep_vars=True))
    encoder_head = max((int(n.split(".")[1]) for n in own if n.startswith("class_embed.")), default=-1)
    two_stage = "transformer.pos_trans.weight" in own  # DINO's proposals have classes, and a head of another name
    kept = []
    for name, value in heads.items():
        if name not in own or own[name].shape[1:] != value.shape[1:]:
            continue
        if two_stage and f"class_embed.{encoder_head}." in name:
            own[name][0] = value[0]
            kept.append(name)
            continue
        if common:
            ours, theirs = (torch.tensor(side) for side in zip(*common))
            to, source = _rows(name, len(own[name]), own, ours), _rows(name, len(value), heads, theirs)
            own[name][to] = value[source].to(own[name])
        if BACKGROUND.search(name):
            own[name][-1] = value[-1]
            kept.append(name)
    return kept


def _rows(name: str, rows: int, state: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the rows (N * rows per class) of N `labels` in the tensor `name` of `state`, which has `rows` rows."""
    if ANCHORS.search(name):
        return torch.arange(rows).view(-1, _classes(state))[:, labels].flatten()
    if BOXES.search(name):
        return torch.arange(rows).view(-1, 4)[labels].flatten()
    return labels


def _classes(state: Mapping[str, Tensor]) -> int:
    return len(state["class_embed.0.weight"])
