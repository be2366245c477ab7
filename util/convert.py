"""From the names of published files to ours.

Our parameter names are those of Deformable-DETR and H-DETR files, so only wrappers have to be taken off. A family with
other names gets a file with a table of its own (`util.convert_mmdet`).

Kept oddities of those files: shared heads are stored under every name they have; a FLOPs counter left its numbers
between the weights; H-DETR's query table holds the training-only queries behind those of inference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from util.convert_mmdet import from_mmdet, is_mmdet

Rule = tuple[str, str]  # regular expression at the beginning of a name, replacement

# What wraps a model adds a prefix to every name.
WRAPPERS: tuple[Rule, ...] = (
    (r"module\.", ""),  # DistributedDataParallel, DataParallel, averaged models
    (r"_orig_mod\.", ""),  # torch.compile
)
# DINO's files have no name between `backbone.0.` and the parts of a Swin transformer.
PARTS: tuple[Rule, ...] = ((r"backbone\.0\.(?=patch_embed\.|layers\.|norm\d\.)", "backbone.0.body."),)
# Where the weights are in a file, in order of preference.
ENTRIES = ("model", "state_dict", "ema")
# Numbers that a FLOPs counter registered as buffers.
COUNTERS = ("total_params", "total_ops")
# A row per query, those of training-only queries last: Deformable-DETR and H-DETR; DINO; DAB.
QUERY_TABLES = ("query_embed.weight", "transformer.tgt_embed.weight", "tgt_embed.weight", "refpoint_embed.weight")
GROUPS = "groups."  # the training schemes inside a detector
# Parts of training schemes that published files hold at the top.
PUBLISHED = ("label_enc.",)


def find_weights(content: Any) -> dict[str, Tensor] | None:
    """Return the mapping of names to tensors inside the content of a file, None if there is none."""
    while isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        content = next((content[name] for name in ENTRIES if name in content), None)
    return None


def to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` under our names, in the order of the file; wrappers and counters are gone.

    Raises:
        UserError: it is of a detector whose names are not known.
    """
    state = {name: value for name, value in state.items() if name.rpartition(".")[2] not in COUNTERS}
    changed = True
    while changed and state:
        changed = False
        for pattern, replacement in WRAPPERS:
            if all(re.match(pattern, name) for name in state):
                state = {re.sub("^" + pattern, replacement, name): value for name, value in state.items()}
                changed = True
    if is_mmdet(state):
        return from_mmdet(state)
    for pattern, replacement in PARTS:
        state = {re.sub("^" + pattern, replacement, name): value for name, value in state.items()}
    return state


def fit_to_model(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    aliases: Sequence[Sequence[str]],
    schemes: Collection[str] = (),
) -> tuple[dict[str, Tensor], list[str]]:
    """Settle what is a matter of names and row counts only.

    * A tensor with several names (`aliases`): the first is needed, the others may be missing. If the copies differ the
      last one in the order of the file wins, which is what loading them one after the other gave.
    * A query table with more rows than ours (H-DETR: training-only queries follow those of inference): its first rows.
    * `num_batches_tracked` that our frozen norms do not have is dropped.
    * Parts that only a training scheme has (`groups.NAME.*`) are dropped where the model is without it.

    Args:
        state: native names.
        own: the state dict of the model.
        aliases: names of `own` that are one tensor, in its order, per tensor.
        schemes: names of the training schemes that the model has, with parameters or without.

    Returns:
        The fitted state and lines that say what was changed.
    """
    fitted = {n: v for n, v in state.items() if n in own or not n.endswith("num_batches_tracked")}
    absent = sorted(
        {f"{GROUPS}{n.split('.')[1]}." for n in fitted if n.startswith(GROUPS) and n.split(".")[1] not in schemes}
        | {part for part in PUBLISHED if not any(n.startswith(part) for n in own)}
        & {f"{n.split('.')[0]}." for n in fitted}
    )
    fitted = {n: v for n, v in fitted.items() if not n.startswith(tuple(absent))}
    lines = [f"left out what only training needs: {', '.join(f'{name}*' for name in absent)}"] if absent else []
    for names in aliases:
        if names[0] not in fitted:  # refinement shows in the first names: a file without them is of another model
            continue
        copies = [name for name in fitted if name in names]
        value = fitted[copies[-1]]
        if any(fitted[n].shape != value.shape or not torch.equal(fitted[n], value) for n in copies):
            lines.append(f"{len(copies)} names of one tensor differ in the file: took {copies[-1]}, not {copies[0]}")
        fitted.update((name, value) for name in names)
    for name in QUERY_TABLES:
        table, wanted = fitted.get(name), own.get(name)
        if table is None or wanted is None:
            continue
        if table.shape[1:] == wanted.shape[1:] and len(table) > len(wanted):
            lines.append(f"{name}: took the first {len(wanted)} of {len(table)} rows")
            fitted[name] = table[: len(wanted)].clone()
    return fitted, lines
