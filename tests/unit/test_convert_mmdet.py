"""Published Co-DETR files, which have mmdet's names: nothing is lost, everything lands where it belongs."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import Tensor

from models import build_model
from models.backbones.swin import SWINS, SwinTransformer
from tests.conftest import CASES
from tests.mmdet_file import CLASSES, ENCODER_LAYERS, mmdet_file, mmdet_state
from tests.tiny import tiny_args
from util.checkpoint import compare_classes, init_from, load_weights, read_checkpoint, write_atomically
from util.convert import to_native
from util.convert_mmdet import BEGINNINGS, class_names, from_mmdet, is_mmdet
from util.errors import UserError
from util.misfit import SWIN_STEM, SWIN_TABLE, describe

TWO_STAGE = "--with_box_refine --two_stage --mixed_selection"
DECODER = "query_head.transformer.decoder.layers.1"


def tiny_model(flags: str = "") -> torch.nn.Module:
    return build_model(tiny_args(flags))[0]


def golden(name: str) -> dict:
    """Return the description of a golden case."""
    return json.loads((CASES / f"{name}.json").read_text())


def published_names(name: str) -> dict[str, Tensor]:
    """Return empty tensors under the names and of the shapes of a golden case."""
    return {n: torch.empty(shape) for n, shape in golden(name)["weights"]["tensors"]}


# names


@pytest.mark.parametrize("name", ["co_deformable_r50_k2", "co_deformable_r50_plain_k2"])
def test_every_name_of_a_published_model_becomes_one_of_ours(name):
    state = published_names(name)
    converted = from_mmdet(state)
    assert not [n for n in converted if n.startswith(BEGINNINGS)]
    table = state.pop("query_head.transformer.head_pos_embed.weight")  # cut into its rows
    rows = {f"groups.co.queries.head_pos_embed.{head}" for head in ("faster_rcnn", "atss")[: len(table)]}
    for official, value in state.items():
        here = [n for n, v in converted.items() if v is value]
        second = [n for n in here if n.startswith("transformer.decoder.") and "_embed." in n]
        assert len(here) - len(second) == 1, f"{official} became {here}"
    added = {n for n, v in converted.items() if not any(v is value for value in state.values())}
    assert added == {f"input_proj.{level}.0.bias" for level in range(4)} | rows


def test_the_names_are_those_of_the_model_and_of_the_auxiliary_parts():
    model = tiny_model(TWO_STAGE)
    converted = from_mmdet(mmdet_state())
    inside = {n for n in converted if not n.startswith("groups.co.")}
    assert inside == set(model.state_dict())
    co = {n.removeprefix("groups.co.") for n in set(converted) - inside}
    assert {".".join(n.split(".")[:3]) for n in co if n.startswith("heads.")} == {
        "heads.faster_rcnn.rpn",
        "heads.faster_rcnn.roi",
        *(f"heads.atss.{part}" for part in ("cls_convs", "reg_convs", "atss_cls", "atss_reg", "atss_centerness")),
        "heads.atss.scales",
    }
    assert {n for n in co if not n.startswith("heads.")} == {
        *(f"downsample.{i}.{part}" for i in range(2) for part in ("weight", "bias")),
        "queries.head_pos_embed.faster_rcnn",
        "queries.head_pos_embed.atss",
        *(
            f"queries.{table}.{head}.{part}"
            for table in ("aux_pos_trans", "aux_pos_trans_norm", "pos_feats_trans", "pos_feats_norm")
            for head in ("faster_rcnn", "atss")
            for part in ("weight", "bias")
        ),
    }


def test_parts_of_the_heads_keep_their_values():
    state = mmdet_state()
    converted = from_mmdet(state)
    pairs = {
        "rpn_head.rpn_reg.bias": "groups.co.heads.faster_rcnn.rpn.rpn_reg.bias",
        "roi_head.0.bbox_head.shared_fcs.1.weight": "groups.co.heads.faster_rcnn.roi.shared_fcs.1.weight",
        "bbox_head.0.cls_convs.0.gn.bias": "groups.co.heads.atss.cls_convs.0.gn.bias",
        "bbox_head.0.scales.4.scale": "groups.co.heads.atss.scales.4.scale",
        "query_head.downsample.0.weight": "groups.co.downsample.0.weight",
        "query_head.transformer.pos_feats_trans.1.bias": "groups.co.queries.pos_feats_trans.atss.bias",
    }
    for official, own in pairs.items():
        assert converted[own] is state[official]


def test_a_swin_has_our_names_but_for_the_beginning():
    meta = golden("co_swin")
    size = {k: meta["model"][k] for k in ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")}
    body = SwinTransformer(**size, out_stages=tuple(meta["model"]["out_indices"]))
    ours = {f"backbone.0.body.{n}" for n in body.state_dict() if not n.endswith("relative_position_index")}
    state = {**mmdet_state(), **published_names("co_swin")}
    state = {n: v for n, v in state.items() if not n.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    state = {n: v for n, v in state.items() if not n.startswith(tuple(f"backbone.layer{i}" for i in "234"))}
    assert {n for n in from_mmdet(state) if n.startswith("backbone.")} == ours


def test_our_own_files_are_left_as_they_are():
    state = tiny_model(TWO_STAGE).state_dict()
    assert not is_mmdet(state)
    assert all(value is state[name] for name, value in to_native(state).items())


# loading


def test_a_file_fills_a_model_that_has_no_auxiliary_heads():
    state, model = mmdet_state(), tiny_model(TWO_STAGE)
    torch.nn.init.ones_(model.input_proj[3][0].bias)
    report = load_weights(model, mmdet_file(state, "abcd"))
    assert report.fits
    assert report.lines == ["left out what only training needs: groups.co.*"]
    decoder = model.transformer.decoder
    assert torch.equal(decoder.layers[1].norm2.weight, state[f"{DECODER}.norms.0.weight"])  # after self-attention
    assert torch.equal(decoder.layers[1].norm1.bias, state[f"{DECODER}.norms.1.bias"])  # after cross-attention
    assert torch.equal(decoder.layers[1].norm3.weight, state[f"{DECODER}.norms.2.weight"])
    assert torch.equal(decoder.layers[1].linear2.bias, state[f"{DECODER}.ffns.0.layers.1.bias"])
    assert torch.equal(model.input_proj[3][0].weight, state["neck.extra_convs.0.conv.weight"])
    assert all((projection[0].bias == 0).all() for projection in model.input_proj)
    assert torch.equal(model.class_embed[2].bias, state["query_head.cls_branches.2.bias"])  # of the encoder
    assert torch.equal(decoder.bbox_embed[1].layers[2].weight, state["query_head.reg_branches.1.4.weight"])
    assert torch.equal(model.query_embed.weight, state["query_head.query_embedding.weight"])
    encoder = model.transformer.encoder.layers[ENCODER_LAYERS - 1]
    assert torch.equal(encoder.norm2.bias, state["query_head.transformer.encoder.layers.0.norms.1.bias"])


def test_without_refinement_one_head_serves_all_layers_and_the_last_one_in_the_file_counts():
    state = mmdet_state(two_stage=False, refine=False)
    assert load_weights(tiny_model(), mmdet_file(state, "abcd")).fits
    state["query_head.cls_branches.1.bias"] = torch.full((CLASSES,), 5.0)
    model = tiny_model()
    report = load_weights(model, mmdet_file(state, "abcd"))
    assert (model.class_embed[0].bias == 5.0).all()
    assert any("took class_embed.1.bias" in line for line in report.lines)
    assert torch.equal(model.query_embed.weight, state["query_head.query_embedding.weight"])  # position, content


def test_refinement_without_two_stage_is_seen_in_the_box_heads():
    state = mmdet_state(two_stage=False)
    assert load_weights(tiny_model("--with_box_refine"), mmdet_file(state, "abcd")).fits
    with pytest.raises(UserError, match="leave --with_box_refine out"):
        load_weights(tiny_model("--with_box_refine"), mmdet_file(mmdet_state(two_stage=False, refine=False), "abcd"))


def test_raw_weights_beside_averaged_ones_and_counters_are_left_out():
    state = mmdet_state()
    state["ema_query_head_query_embedding_weight"] = torch.zeros(1)
    converted = from_mmdet(state)
    assert not [n for n in converted if n.startswith("ema_") or n.endswith("num_batches_tracked")]
    assert "backbone.0.body.bn1.running_var" in converted


@pytest.mark.parametrize("head", ["faster_rcnn", "atss"])
def test_a_file_of_one_auxiliary_head_loses_the_unused_second_row(head):
    state = mmdet_state(heads=[head])
    assert len(state["query_head.transformer.head_pos_embed.weight"]) == 2
    converted = from_mmdet(state)
    first = state["query_head.transformer.head_pos_embed.weight"][0]
    assert torch.equal(converted[f"groups.co.queries.head_pos_embed.{head}"], first)
    official = state["query_head.transformer.aux_pos_trans.0.weight"]
    assert converted[f"groups.co.queries.aux_pos_trans.{head}.weight"] is official
    assert {n.split(".")[4] for n in converted if n.startswith("groups.co.queries.")} == {head}
    assert {n.split(".")[3] for n in converted if n.startswith("groups.co.heads.")} == {head}


def test_a_published_model_of_one_head_loses_the_unused_parts_only():
    state = published_names("co_deformable_r50_k1_atss")
    converted = from_mmdet(state)
    lost = {n for n, value in state.items() if not any(v is value for v in converted.values())}
    tables = ("aux_pos_trans", "aux_pos_trans_norm", "pos_feats_trans", "pos_feats_norm")
    unused = {f"query_head.transformer.{t}.1.{part}" for t in tables for part in ("weight", "bias")}
    assert lost == (unused & set(state)) | {"query_head.transformer.head_pos_embed.weight"}


def test_an_unknown_part_is_reported_and_not_lost():
    state = {**mmdet_state(), "query_head.transformer.something.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"not in the model:\s+query_head\.transformer\.something\.weight"):
        load_weights(tiny_model(TWO_STAGE), mmdet_file(state, "abcd"))


# advice and refusals


def test_flags_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"file\.pth is of another model") as caught:
        load_weights(tiny_model("--dim_feedforward 64"), mmdet_file(mmdet_state(), "abcd"), name="file.pth")
    for flag in ("add --two_stage", "add --with_box_refine", "add --mixed_selection", "use --dim_feedforward 48"):
        assert flag in str(caught.value)


def test_eighty_classes_are_explained_to_a_model_with_coco_ids():
    content = mmdet_file(mmdet_state(classes=80), [])
    with pytest.raises(UserError, match="use --category_ids contiguous"):
        load_weights(tiny_model(f"{TWO_STAGE} --num_classes 91"), content)
    assert load_weights(tiny_model(f"{TWO_STAGE} --num_classes 80"), content).fits


@pytest.mark.parametrize("name", SWINS)
def test_the_swin_of_a_file_is_told_by_width_blocks_and_window(name):
    size = SWINS[name]
    state = {f"backbone.0.body.layers.2.blocks.{i}.norm1.weight": torch.zeros(1) for i in range(size.depths[2])}
    state[SWIN_STEM] = torch.zeros(size.embed_dim, 3, 4, 4)
    state[SWIN_TABLE] = torch.zeros((2 * size.window_size - 1) ** 2, 1)
    assert describe(state)["backbone"] == name
    state[SWIN_STEM] = torch.zeros(20, 3, 4, 4)
    assert "a Swin of width 20" in describe(state)["backbone"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("backbone.blocks.0.norm1.weight", "ViT"),
        ("backbone.stages.0.blocks.0.norm1.weight", "Swin"),
        ("mask_head.fuse_conv.0.weight", "mask head"),
    ],
)
def test_other_members_of_the_family_are_refused_by_name(more, message):
    state = {**mmdet_state(), more: torch.zeros(1)}
    with pytest.raises(UserError, match=rf"checkpoint file\.pth: .*{message}.*Co-Deformable-DETR"):
        load_weights(tiny_model(TWO_STAGE), {"state_dict": state}, name="file.pth")


def test_other_detectors_of_mmdet_are_refused():
    state = {"backbone.conv1.weight": torch.zeros(1), "neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="no query_head"):
        load_weights(tiny_model(), {"state_dict": state})


# the file


def test_a_file_is_read_without_running_code_and_other_types_are_refused(tmp_path):
    write_atomically(mmdet_file(mmdet_state(), "abcd"), tmp_path / "co.pth")
    assert class_names(read_checkpoint(tmp_path / "co.pth")) == list("abcd")
    content = mmdet_file({}, "abcd") | {"best": np.float64(0.5)}
    write_atomically(content, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"holds the class numpy.*scalar, which is not loaded.*`state_dict`"):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"meta": {"CLASSES": ("a", "b")}}, ["a", "b"]),
        ({"meta": {"dataset_meta": {"CLASSES": ["a", "b"]}}}, ["a", "b"]),
        ({"meta": {"dataset_meta": {"classes": ("a",)}}}, ["a"]),
        ({"meta": {"CLASSES": None, "config": ""}}, None),
        ({"meta": "text"}, None),
        ({"args": Namespace()}, None),
    ],
)
def test_class_names_are_found_in_both_generations_of_files(content, names):
    assert class_names(content) == names


def test_classes_in_another_order_are_warned_of():
    content = mmdet_file(mmdet_state(), ["cat", "dog", "bird", "cow"])
    assert compare_classes(content, ["cat", "dog", "bird", "cow"]) == ""
    assert "'cat' is 'dog' here" in compare_classes(content, ["dog", "cat", "bird", "cow"])


def test_class_rows_are_copied_by_the_names_in_the_file(tmp_path):
    state = mmdet_state()
    write_atomically(mmdet_file(state, ["cat", "dog", "bird", "cow"]), tmp_path / "co.pth")
    model = tiny_model(f"{TWO_STAGE} --num_classes 2")
    _, copied = init_from(model, str(tmp_path / "co.pth"), ["cow", "frog"], copy_class_rows=True)
    assert copied == ["cow"]
    assert torch.equal(model.class_embed[0].weight[0], state["query_head.cls_branches.0.weight"][3])
