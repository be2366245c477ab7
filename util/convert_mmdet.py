"""From the names of published Co-DETR files, which are mmdet's, to ours (Co-Deformable-DETR, Co-DINO; ResNet or Swin).

Known differences besides names: the decoder's norms are numbered in the order self-attention, cross-attention (ours:
as in Deformable-DETR, the other way round); the input projections have no bias, ours get zeros; parts that decoder and
heads share are stored once; a file for one auxiliary head holds unused parameters of a second one; the heads of
Co-DINO's proposals follow those of the decoder, ours are inside the transformer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError

# mmdet's detectors call their parts so; none of our names begins like this.
BEGINNINGS = ("query_head.", "bbox_head.", "rpn_head.", "roi_head.", "neck.")
# Parts of other members of the family, and what they are.
OTHER_MODELS = {
    "backbone.blocks.": "a ViT backbone",
    "backbone.stages.": "mmdet's own Swin backbone, which merges patches in another order",
    "mask_head.": "a mask head",
}

_TRANSFORMER = r"query_head\.transformer\."
_ENCODER = _TRANSFORMER + r"encoder\.layers\.(\d+)\."
_DECODER = _TRANSFORMER + r"decoder\.layers\.(\d+)\."
_CO = "groups.co."
_QUERIES = _CO + "queries."
_PER_HEAD = "aux_pos_trans|aux_pos_trans_norm|pos_feats_trans|pos_feats_norm"

# Regular expression at the beginning of a name, replacement; the first that matches is taken.
RULES: tuple[tuple[str, str], ...] = (
    (r"backbone\.", "backbone.0.body."),
    (r"neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"neck\.convs\.(\d+)\.gn\.", r"input_proj.\1.1."),
    (_TRANSFORMER + "level_embeds$", "transformer.level_embed"),
    (_ENCODER + r"attentions\.0\.", r"transformer.encoder.layers.\1.self_attn."),
    (_ENCODER + r"norms\.0\.", r"transformer.encoder.layers.\1.norm1."),
    (_ENCODER + r"norms\.1\.", r"transformer.encoder.layers.\1.norm2."),
    (_DECODER + r"attentions\.0\.attn\.", r"transformer.decoder.layers.\1.self_attn."),
    (_DECODER + r"attentions\.1\.", r"transformer.decoder.layers.\1.cross_attn."),
    (_DECODER + r"norms\.0\.", r"transformer.decoder.layers.\1.norm2."),
    (_DECODER + r"norms\.1\.", r"transformer.decoder.layers.\1.norm1."),
    (_DECODER + r"norms\.2\.", r"transformer.decoder.layers.\1.norm3."),
    (_TRANSFORMER + r"(en|de)coder\.layers\.(\d+)\.ffns\.0\.layers\.0\.0\.", r"transformer.\1coder.layers.\2.linear1."),
    (_TRANSFORMER + r"(en|de)coder\.layers\.(\d+)\.ffns\.0\.layers\.1\.", r"transformer.\1coder.layers.\2.linear2."),
    (_TRANSFORMER + r"(enc_output|enc_output_norm|pos_trans|pos_trans_norm|reference_points)\.", r"transformer.\1."),
    (_TRANSFORMER + r"decoder\.ref_point_head\.0\.", "transformer.decoder.ref_point_head.layers.0."),
    (_TRANSFORMER + r"decoder\.ref_point_head\.2\.", "transformer.decoder.ref_point_head.layers.1."),
    (_TRANSFORMER + r"decoder\.norm\.", "transformer.decoder.norm."),
    (_TRANSFORMER + r"query_embed\.", "transformer.tgt_embed."),
    (r"query_head\.label_embedding\.", "label_enc."),
    (_TRANSFORMER + rf"({_PER_HEAD}|head_pos_embed)\.", _QUERIES + r"\1."),
    (r"query_head\.query_embedding\.", "query_embed."),
    (r"query_head\.cls_branches\.", "class_embed."),
    (r"query_head\.reg_branches\.(\d+)\.0\.", r"bbox_embed.\1.layers.0."),
    (r"query_head\.reg_branches\.(\d+)\.2\.", r"bbox_embed.\1.layers.1."),
    (r"query_head\.reg_branches\.(\d+)\.4\.", r"bbox_embed.\1.layers.2."),
    (r"query_head\.downsample\.", _CO + "downsample."),
    (r"rpn_head\.", _CO + "heads.faster_rcnn.rpn."),
    (r"roi_head\.0\.bbox_head\.", _CO + "heads.faster_rcnn.roi."),
    (r"bbox_head\.0\.", _CO + "heads.atss."),
)


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names of `state` are those of a detector of mmdet."""
    return any(name.startswith(BEGINNINGS) for name in state)


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published Co-Deformable-DETR or Co-DINO state under our names, auxiliary parts under `groups.co.`.

    Averaged models hold their raw weights too, as `ema_*`; those are left out, and so are the `num_batches_tracked` of
    frozen norms. A name without a rule is kept: loading reports it as one that the model does not have.

    Raises:
        UserError: the file is of another detector of mmdet.
    """
    _check_family(state)
    maps = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("ema_") or name.endswith("num_batches_tracked"):
            continue
        own = _own_name(name, maps)
        result[own] = value
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", own):
            result[own.removesuffix("weight") + "bias"] = torch.zeros(len(value), dtype=value.dtype)
    if "transformer.tgt_embed.weight" in result:
        result = _move_proposal_heads(result)
    _add_second_names(result)
    _name_queries(result)
    return result


def class_names(content: Mapping[str, Any]) -> list[str] | None:
    """Return the class names by class index in a file of mmdet (2.x: `meta.CLASSES`, 3.x: `meta.dataset_meta`)."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return None
    inner = meta.get("dataset_meta")
    found = [part.get(key) for part in (meta, inner) if isinstance(part, Mapping) for key in ("CLASSES", "classes")]
    return next((list(names) for names in found if isinstance(names, Sequence) and not isinstance(names, str)), None)


def _check_family(state: Mapping[str, Tensor]) -> None:
    if not any(name.startswith("query_head.transformer.") for name in state):
        raise UserError(
            "it has the names of mmdet, but no query_head.transformer: of mmdet's detectors only Co-Deformable-DETR "
            "and Co-DINO files are understood"
        )
    found = {what for start, what in OTHER_MODELS.items() if any(name.startswith(start) for name in state)}
    if found:
        raise UserError(
            f"it is a Co-DETR file with {' and '.join(sorted(found))}; of the published Co-DETR files those of "
            "Co-Deformable-DETR and Co-DINO with a ResNet or Swin backbone are understood"
        )


def _own_name(name: str, maps: int) -> str:
    """Return our name for a name of the file; `maps` is the number of backbone maps."""
    extra = re.match(r"neck\.extra_convs\.(\d+)\.", name)
    if extra:  # extra levels are counted on from the backbone's
        name = f"neck.convs.{maps + int(extra[1])}.{name[extra.end() :]}"
    for pattern, replacement in RULES:
        own, matched = re.subn("^" + pattern, replacement, name)
        if matched:
            return own
    return name


def _move_proposal_heads(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` with the heads after those of the decoder layers where Co-DINO has them, in the transformer."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("class_embed."))
    inside = rf"^(class|bbox)_embed\.{last}\."
    return {re.sub(inside, r"transformer.enc_out_\1_embed.", name): value for name, value in state.items()}


def _add_second_names(state: dict[str, Tensor]) -> None:
    """Add the names inside the decoder of the heads of a model with refinement.

    Its heads differ by layer; without refinement one head is stored under every layer's name.
    """
    two_stage = "transformer.enc_output.weight" in state
    heads = [value for name, value in state.items() if re.fullmatch(r"bbox_embed\.\d+\.layers\.2\.bias", name)]
    if two_stage or any(not torch.equal(heads[0], other) for other in heads[1:]):
        shared = ("bbox_embed.", "class_embed.") if two_stage else ("bbox_embed.",)
        state.update({f"transformer.decoder.{n}": v for n, v in list(state.items()) if n.startswith(shared)})


def _name_queries(state: dict[str, Tensor]) -> None:
    """Name the query parameters by head, as ours: the file numbers them, two-stage heads first.

    Its tables always have two rows or more; those without a head are dropped.
    """
    found = {name.split(".")[3] for name in state if name.startswith(_CO + "heads.")}
    heads = [name for name in ("faster_rcnn", "atss") if name in found]
    for name in [n for n in state if heads and n.startswith(_QUERIES)]:
        value = state.pop(name)
        per_head = re.fullmatch(rf"{re.escape(_QUERIES)}({_PER_HEAD})\.(\d+)\.(\w+)", name)
        if per_head is None:  # the table of embeddings
            state.update({f"{_QUERIES}head_pos_embed.{head}": row.clone() for head, row in zip(heads, value)})
        elif int(per_head[2]) < len(heads):
            state[f"{_QUERIES}{per_head[1]}.{heads[int(per_head[2])]}.{per_head[3]}"] = value
