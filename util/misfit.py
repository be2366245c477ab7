"""Why a checkpoint does not fit a model, in words that name the flags to change."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

SHOWN_GROUPS = 12
HEAD = r"groups\.co\.heads\.(\w+)"
SWIN_STEM = "backbone.0.body.patch_embed.proj.weight"
SWIN_TABLE = "backbone.0.body.layers.0.blocks.0.attn.relative_position_bias_table"


@dataclass
class LoadReport:
    """What happened to the names of a checkpoint."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # in the model, not in the file
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)  # name: (file's, ours)
    lines: list[str] = field(default_factory=list)  # what was converted on the way
    advice: list[str] = field(default_factory=list)  # flags that would help

    @property
    def fits(self) -> bool:
        """Whether every tensor of the model was loaded and every tensor of the file used."""
        return not (self.missing or self.unexpected or self.reshaped)

    def text(self) -> str:
        """Return the misfits, grouped, and the advice; one item per line."""
        shapes = [f"{n}: {list(a)} in the file, {list(b)} in the model" for n, (a, b) in self.reshaped.items()]
        groups = {
            "missing in the file": group_names(self.missing),
            "not in the model": group_names(self.unexpected),
            "of another shape": group_names(shapes),
        }
        lines = []
        for title, found in groups.items():
            if found:
                lines.append(f"{title}:")
                lines += [f"  {name}" for name in found[:SHOWN_GROUPS]]
                if len(found) > SHOWN_GROUPS:
                    lines.append(f"  ... and {len(found) - SHOWN_GROUPS} more groups")
        return "\n".join(lines + self.advice)


def group_names(names: Iterable[str]) -> list[str]:
    """Return names with their layer numbers replaced by `*`, each once, with its count."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{name} (x{count})" if count > 1 else name for name, count in counts.items()]


def describe(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the flags that a state dict of this family was built with, as far as names and shapes tell."""
    flags: dict[str, object] = {}

    def rows(name: str, axis: int = 0) -> int | None:
        return state[name].shape[axis] if name in state and state[name].ndim > axis else None

    def count(pattern: str, group: int = 1) -> int:
        return len({m.group(group) for m in (re.match(pattern, name) for name in state) if m})

    flags["two_stage"] = "transformer.enc_output.weight" in state
    flags["with_box_refine"] = any(n.startswith("transformer.decoder.bbox_embed.") for n in state)
    flags["mixed_selection"] = bool(flags["two_stage"]) and "query_embed.weight" in state
    anchors = "transformer.decoder.ref_point_head.layers.0.weight" in state
    flags["query_pos"] = "box" if anchors else "fixed"
    flags["query_scale"] = "transformer.decoder.query_scale.layers.0.weight" in state
    flags["decoder_norm"] = "transformer.decoder.norm.weight" in state
    if anchors:
        flags["mixed_selection"] = bool(flags["two_stage"]) and "transformer.tgt_embed.weight" in state
    flags["hidden_dim"] = rows("transformer.level_embed", 1)
    flags["num_feature_levels"] = rows("transformer.level_embed")
    flags["dim_feedforward"] = rows("transformer.encoder.layers.0.linear1.weight")
    flags["enc_layers"] = count(r"transformer\.encoder\.layers\.(\d+)\.")
    flags["dec_layers"] = count(r"transformer\.decoder\.layers\.(\d+)\.")
    flags["num_classes"] = rows("class_embed.0.weight")
    flags["backbone"] = _backbone(state, count)
    flags["position_embedding"] = "learned" if "backbone.1.row_embed.weight" in state else "sine"
    tables = ("query_embed.weight", "transformer.tgt_embed.weight", "tgt_embed.weight")
    flags["queries"] = next((rows(name) for name in tables if name in state), None)
    labels = rows("label_enc.weight")
    flags["dn_labelbook_size"] = None if labels is None else labels - 1
    flags["samples"] = rows("transformer.encoder.layers.0.self_attn.attention_weights.weight")
    heads = sorted({m[1] for m in (re.match(HEAD + r"\.", n) for n in state) if m})
    flags["aux_heads"] = " ".join(re.sub(r"\d+$", "", name) for name in heads)  # atss2 is a second atss
    flags["aux_queries"] = any(name.startswith("groups.co.queries.") for name in state)
    flags["aux_convs"] = count(HEAD + r"\.cls_convs\.(\d+)\.", 2)
    return flags


def _backbone(state: Mapping[str, Tensor], count) -> str | None:
    body = r"backbone\.0\.body\."
    if SWIN_TABLE in state and SWIN_STEM in state:
        return _swin(state, count(body + r"layers\.2\.blocks\.(\d+)\."))
    blocks = count(body + r"layer3\.(\d+)\.")
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in state
    names = {(2, False): "resnet18", (6, False): "resnet34", (6, True): "resnet50", (23, True): "resnet101"}
    return names.get((blocks, bottleneck))


def _swin(state: Mapping[str, Tensor], blocks: int) -> str:
    """Return the name of a Swin by its width, the number of blocks in stage 3 and its window."""
    from models.backbones.swin import SWINS

    width = len(state[SWIN_STEM])
    window = (math.isqrt(len(state[SWIN_TABLE])) + 1) // 2  # the table has (2 window - 1) ** 2 rows
    for name, size in SWINS.items():
        if (size.embed_dim, size.depths[2], size.window_size) == (width, blocks, window):
            return name
    return f"a Swin of width {width} with {blocks} blocks in stage 3 and window {window}"


def advise(state: Mapping[str, Tensor], own: Mapping[str, Tensor], stored_args: Mapping[str, object]) -> list[str]:
    """Return one line per flag that would make the model fit the file.

    Args:
        state: of the file, native names.
        own: state dict of the model.
        stored_args: the arguments in the file, empty if there are none.
    """
    theirs, ours = describe(state), describe(own)
    lines = []
    for flag, value in theirs.items():
        mine = ours[flag]
        if flag == "dn_labelbook_size":
            if mine is not None and value != mine:
                lines.append(_advise_labels(value, mine))
            continue  # a model without denoising leaves out the labels of a file
        if value == mine or value is None:
            continue
        if flag.startswith("aux_"):
            lines += _advise_heads(flag, value, theirs, ours)
            continue
        if isinstance(value, bool):
            lines.append(f"add --{flag}" if value else f"leave --{flag} out (after a preset: --no-{flag})")
        elif flag == "queries":
            lines.append(
                f"the query table has {value} rows, this model's {mine or 'none'}: set --num_queries_one2one and "
                "--num_queries_one2many as in training"
            )
        elif flag == "samples":
            known = {n: stored_args[n] for n in ("nheads", "enc_n_points", "dec_n_points") if n in stored_args}
            said = "; the file says " + " ".join(f"--{n} {v}" for n, v in known.items()) if known else ""
            if theirs["num_feature_levels"] == ours["num_feature_levels"]:
                lines.append(f"check --nheads, --enc_n_points and --dec_n_points{said}")
        elif (flag, value, mine) == ("num_classes", 80, 91):
            lines.append("use --category_ids contiguous: the file numbers the 80 classes of COCO without gaps")
        elif flag == "num_classes":
            lines.append(
                f"the file has {value} classes, this model {mine}: to fine-tune on other classes use --init_from in "
                f"place of --resume; for the same classes --num_classes {value} (COCO's 91: --category_ids raw)"
            )
        else:
            lines.append(f"use --{flag} {value} (now {mine})")
    return ["try: " + line for line in lines]


def _advise_labels(value: object, mine: object) -> str:
    """Return the advice about the label embeddings of denoising."""
    if value is None:
        return "the file has no label embeddings (stripped, or trained without denoising): evaluate with --dn_number 0"
    return f"use --dn_labelbook_size {value} (now {mine})"


def _advise_heads(flag: str, value: object, theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """Return the advice about auxiliary heads; a model without any takes every file."""
    if not ours["aux_heads"]:
        return []
    if not theirs["aux_heads"]:
        what = "the file has no auxiliary heads (stripped, or trained without): leave out --aux_heads and --eval_head"
        return [f"{what}, or take the file of the training"] if flag == "aux_heads" else []
    if flag == "aux_queries":
        return ["leave out --lambda1 0: the file has queries of auxiliary heads" if value else "add --lambda1 0"]
    return [f"use --{flag} {value} (now {ours[flag]})"]
