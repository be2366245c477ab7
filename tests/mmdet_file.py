"""A tiny Co-Deformable-DETR or Co-DINO as mmdet stores it: the published names, by hand, over drawn numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor

from tests.golden.fill import draw

WIDTH, FEEDFORWARD, QUERIES, CLASSES, ENCODER_LAYERS, DECODER_LAYERS = 32, 48, 8, 4, 1, 2  # as tests.tiny.TINY
LEVELS, HEADS, POINTS, ROI_WIDTH = 4, 2, 4, 16

Part = tuple[str, tuple[int, ...]]


def mmdet_state(
    *,
    two_stage: bool = True,
    refine: bool = True,
    heads: Sequence[str] = ("faster_rcnn", "atss"),
    classes: int = CLASSES,
    boxes: bool = False,
) -> dict[str, Tensor]:
    """Return the state dict of a ResNet-18 model: mixed selection in two-stage, auxiliary `heads`; `boxes`: Co-DINO.

    Heads that the layers share (no refinement) are stored under every layer's index.
    """
    backbone = torchvision.models.resnet18(weights=None).state_dict()
    parts = [(f"backbone.{n}", tuple(v.shape)) for n, v in backbone.items() if not n.startswith("fc.")]
    queries = _box_queries(classes) if boxes else _queries(two_stage)
    parts += [*_neck(), *_layers(), *queries, *_branches(two_stage, classes), *_auxiliary(heads, classes, boxes)]
    state = {name: torch.from_numpy(draw(name, shape)) for name, shape in parts}
    state.update({n: torch.tensor(7) for n in state if n.endswith("num_batches_tracked")})
    if not refine:
        for name in [n for n in state if n.startswith(("query_head.cls_branches.", "query_head.reg_branches."))]:
            first = name.split(".")
            first[2] = "0"
            state[name] = state[".".join(first)].clone()
    return state


def mmdet_file(state: dict[str, Tensor], class_names: Iterable[str]) -> dict:
    """Return the content of a file of mmdet 2.x."""
    meta = {
        "CLASSES": tuple(class_names),
        "config": "model = dict(type='CoDETR')",
        "epoch": 12,
        "seed": 1,
        "hook_msgs": {},
    }
    return {"meta": meta, "state_dict": state}


def _layer(name: str, *shape: int) -> Iterator[Part]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _neck() -> Iterator[Part]:
    for i, channels in enumerate((128, 256, 512)):
        yield f"neck.convs.{i}.conv.weight", (WIDTH, channels, 1, 1)
        yield from _layer(f"neck.convs.{i}.gn", WIDTH)
    yield "neck.extra_convs.0.conv.weight", (WIDTH, 512, 3, 3)
    yield from _layer("neck.extra_convs.0.gn", WIDTH)


def _layers() -> Iterator[Part]:
    yield "query_head.transformer.level_embeds", (LEVELS, WIDTH)
    for i in range(ENCODER_LAYERS):
        layer = f"query_head.transformer.encoder.layers.{i}"
        yield from _deformable(f"{layer}.attentions.0")
        yield from _feedforward_and_norms(layer, 2)
    for i in range(DECODER_LAYERS):
        layer = f"query_head.transformer.decoder.layers.{i}"
        yield f"{layer}.attentions.0.attn.in_proj_weight", (3 * WIDTH, WIDTH)
        yield f"{layer}.attentions.0.attn.in_proj_bias", (3 * WIDTH,)
        yield from _layer(f"{layer}.attentions.0.attn.out_proj", WIDTH, WIDTH)
        yield from _deformable(f"{layer}.attentions.1")
        yield from _feedforward_and_norms(layer, 3)


def _deformable(name: str) -> Iterator[Part]:
    samples = HEADS * LEVELS * POINTS
    for part, rows in (("sampling_offsets", 2 * samples), ("attention_weights", samples)):
        yield from _layer(f"{name}.{part}", rows, WIDTH)
    for part in ("value_proj", "output_proj"):
        yield from _layer(f"{name}.{part}", WIDTH, WIDTH)


def _feedforward_and_norms(layer: str, norms: int) -> Iterator[Part]:
    yield from _layer(f"{layer}.ffns.0.layers.0.0", FEEDFORWARD, WIDTH)
    yield from _layer(f"{layer}.ffns.0.layers.1", WIDTH, FEEDFORWARD)
    for i in range(norms):
        yield from _layer(f"{layer}.norms.{i}", WIDTH)


def _queries(two_stage: bool) -> Iterator[Part]:
    transformer = "query_head.transformer"
    if two_stage:
        yield from _layer(f"{transformer}.enc_output", WIDTH, WIDTH)
        yield from _layer(f"{transformer}.enc_output_norm", WIDTH)
        yield from _layer(f"{transformer}.pos_trans", 2 * WIDTH, 2 * WIDTH)
        yield from _layer(f"{transformer}.pos_trans_norm", 2 * WIDTH)
    else:
        yield from _layer(f"{transformer}.reference_points", 2, WIDTH)
    yield "query_head.query_embedding.weight", (QUERIES, WIDTH if two_stage else 2 * WIDTH)


def _box_queries(classes: int) -> Iterator[Part]:
    transformer = "query_head.transformer"
    yield from _layer(f"{transformer}.decoder.ref_point_head.0", WIDTH, 2 * WIDTH)
    yield from _layer(f"{transformer}.decoder.ref_point_head.2", WIDTH, WIDTH)
    yield from _layer(f"{transformer}.decoder.norm", WIDTH)
    yield from _layer(f"{transformer}.enc_output", WIDTH, WIDTH)
    yield from _layer(f"{transformer}.enc_output_norm", WIDTH)
    yield f"{transformer}.query_embed.weight", (QUERIES, WIDTH)
    yield "query_head.label_embedding.weight", (classes, WIDTH)


def _branches(two_stage: bool, classes: int) -> Iterator[Part]:
    for i in range(DECODER_LAYERS + two_stage):
        yield from _layer(f"query_head.cls_branches.{i}", classes, WIDTH)
        for j, rows in ((0, WIDTH), (2, WIDTH), (4, 4)):
            yield from _layer(f"query_head.reg_branches.{i}.{j}", rows, WIDTH)


def _auxiliary(heads: Sequence[str], classes: int, boxes: bool) -> Iterator[Part]:
    if heads:
        yield from _layer("query_head.downsample.0", WIDTH, WIDTH, 3, 3)
        yield from _layer("query_head.downsample.1", WIDTH)
        made = WIDTH if boxes else 2 * WIDTH
        for i in range(2):  # with one head too
            yield from _layer(f"query_head.transformer.aux_pos_trans.{i}", made, 2 * WIDTH)
            yield from _layer(f"query_head.transformer.aux_pos_trans_norm.{i}", made)
    if heads and not boxes:
        yield "query_head.transformer.head_pos_embed.weight", (2, 1)
        for i in range(2):
            yield from _layer(f"query_head.transformer.pos_feats_trans.{i}", WIDTH, WIDTH)
            yield from _layer(f"query_head.transformer.pos_feats_norm.{i}", WIDTH)
    if "faster_rcnn" in heads:
        yield from _layer("rpn_head.rpn_conv", WIDTH, WIDTH, 3, 3)
        yield from _layer("rpn_head.rpn_cls", 9, WIDTH, 1, 1)
        yield from _layer("rpn_head.rpn_reg", 36, WIDTH, 1, 1)
        yield from _layer("roi_head.0.bbox_head.fc_cls", classes + 1, ROI_WIDTH)
        yield from _layer("roi_head.0.bbox_head.fc_reg", 4 * classes, ROI_WIDTH)
        yield from _layer("roi_head.0.bbox_head.shared_fcs.0", ROI_WIDTH, 49 * WIDTH)
        yield from _layer("roi_head.0.bbox_head.shared_fcs.1", ROI_WIDTH, ROI_WIDTH)
    if "atss" in heads:
        for tower in ("cls_convs", "reg_convs"):
            yield f"bbox_head.0.{tower}.0.conv.weight", (WIDTH, WIDTH, 3, 3)
            yield from _layer(f"bbox_head.0.{tower}.0.gn", WIDTH)
        for part, rows in (("atss_cls", classes), ("atss_reg", 4), ("atss_centerness", 1)):
            yield from _layer(f"bbox_head.0.{part}", rows, WIDTH, 3, 3)
        for level in range(LEVELS + 1):
            yield f"bbox_head.0.scales.{level}.scale", ()
