"""Co-DINO: its files have the names and shapes of the model that its command line makes; its class losses."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from main import get_args_parser
from models import build_detector, build_model
from models.backbones.swin import SWINS, SwinTransformer
from models.criterion import loss_name
from tests.conftest import CASES
from tests.golden.runners.co_dino import FLAGS
from tests.mmdet_file import mmdet_file, mmdet_state
from tests.tiny import tiny_args, tiny_images, tiny_targets
from util.checkpoint import load_weights
from util.convert_mmdet import from_mmdet
from util.errors import UserError

TINY = (
    "--with_box_refine --two_stage --mixed_selection --look_forward_twice --query_pos box --decoder_norm "
    "--aux_heads faster_rcnn atss --dn_number 20 --dn_groups divided --dn_labelbook_size 3 --cls_target quality "
    "--focal_alpha -1"
)
SKIPPED = ("relative_position_index", "num_batches_tracked")


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if not name.endswith(SKIPPED)}


@pytest.mark.parametrize("backbone", ["resnet50", "swin_large_window12"])
def test_names_and_shapes_of_a_file_are_those_of_the_model(backbone: str) -> None:
    case = json.loads((CASES / "co_dino_r50_k2.json").read_text())
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in case["weights"]["tensors"]}
        if backbone.startswith("swin"):
            state = {n: v for n, v in state.items() if not n.startswith(("backbone.", "neck."))}
            state |= _swin(backbone)
        flags = f"{FLAGS} --num_classes 80 --num_queries 40 --backbone {backbone} --backbone_weights none"
        own = shapes(build_detector(get_args_parser().parse_args(flags.split())).state_dict())
    assert shapes(from_mmdet(state)) == own


def _swin(name: str) -> dict[str, Tensor]:
    """Return backbone and neck of a file with four maps of a Swin."""
    size = SWINS[name]
    body = SwinTransformer(
        embed_dim=size.embed_dim,
        depths=size.depths,
        num_heads=size.num_heads,
        window_size=size.window_size,
        drop_path_rate=0.0,
        out_stages=(0, 1, 2, 3),
    )
    state = {f"backbone.{n}": v for n, v in body.state_dict().items()}
    channels = [size.embed_dim * 2**i for i in range(4)]
    kernels = [(f"convs.{i}", c, 1) for i, c in enumerate(channels)] + [("extra_convs.0", channels[-1], 3)]
    for part, inputs, side in kernels:
        state[f"neck.{part}.conv.weight"] = torch.empty(256, inputs, side, side)
        state |= {f"neck.{part}.gn.{kind}": torch.empty(256) for kind in ("weight", "bias")}
    return state


def test_parts_land_where_they_belong() -> None:
    state, (model, _, _) = mmdet_state(boxes=True), build_model(tiny_args(TINY))
    # The region head is narrow in the tiny file.
    load_weights(model, mmdet_file(state, "abcd"), strict=False)
    transformer, prefix = model.transformer, "query_head.transformer"
    last = len(transformer.decoder.layers)
    pairs = {
        f"{prefix}.decoder.ref_point_head.0.weight": transformer.decoder.ref_point_head.layers[0].weight,
        f"{prefix}.decoder.ref_point_head.2.bias": transformer.decoder.ref_point_head.layers[1].bias,
        f"{prefix}.decoder.norm.weight": transformer.decoder.norm.weight,
        f"{prefix}.query_embed.weight": transformer.tgt_embed.weight,
        f"{prefix}.aux_pos_trans.1.weight": model.groups["co"].queries.aux_pos_trans["atss"].weight,
        "query_head.label_embedding.weight": model.label_enc.weight,
        f"query_head.cls_branches.{last}.bias": transformer.enc_out_class_embed.bias,
        f"query_head.reg_branches.{last}.4.weight": transformer.enc_out_bbox_embed.layers[2].weight,
        f"query_head.cls_branches.{last - 1}.bias": model.class_embed[last - 1].bias,
        f"query_head.reg_branches.{last - 1}.2.weight": transformer.decoder.bbox_embed[last - 1].layers[1].weight,
    }
    for official, own in pairs.items():
        assert torch.equal(own, state[official]), official


def test_a_file_is_evaluated_without_the_parts_of_training() -> None:
    model, _, _ = build_model(tiny_args(f"{TINY} --eval --resume co_dino.pth"))
    assert list(model.groups) == ["one2one"]
    report = load_weights(model, mmdet_file(mmdet_state(boxes=True), "abcd"))
    assert report.fits
    assert report.lines == ["left out what only training needs: groups.co.*, label_enc.*"]
    with torch.no_grad():
        assert torch.isfinite(model.eval()(tiny_images()).pred_boxes).all()


def test_another_number_of_label_embeddings_is_explained_where_they_are_needed() -> None:
    content = mmdet_file(mmdet_state(boxes=True), "abcd")
    with pytest.raises(UserError, match=r"try: use --dn_labelbook_size 3 \(now 4\)"):
        load_weights(build_model(tiny_args(TINY.replace("--dn_labelbook_size 3", "")))[0], content)
    with pytest.raises(UserError) as caught:
        load_weights(build_model(tiny_args(f"{TINY} --dim_feedforward 64 --eval --resume x"))[0], content)
    assert "dn_labelbook_size" not in str(caught.value)


def test_a_file_of_one_head_loses_the_unused_second_row() -> None:
    converted = from_mmdet(mmdet_state(boxes=True, heads=["atss"]))
    found = {n for n in converted if n.startswith("groups.co.queries.")}
    tables = ("aux_pos_trans", "aux_pos_trans_norm")
    assert found == {f"groups.co.queries.{t}.atss.{kind}" for t in tables for kind in ("weight", "bias")}


def test_every_class_loss_takes_the_overlap_as_target() -> None:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(TINY))
    targets = tiny_targets()  # two objects
    output = model(tiny_images([(128, 128), (96, 114)]), targets)
    for supervised in output.sets.values():
        supervised.stack.boxes = torch.full_like(supervised.stack.boxes, 0.01)  # a corner that no object touches
    terms = criterion(output, targets).terms
    for name, count in (("one2one", 2), ("interm", 2), ("dn", 2 * 10), ("co_atss", None)):
        found = output.sets[name]
        count = count or found.supervision[0].assign.count
        logits = found.predictions.logits[-1]
        background = (logits.sigmoid() ** 2 * softplus(logits)).sum() / count
        torch.testing.assert_close(terms[loss_name("loss_ce", name, 1, 1)], background.detach(), msg=name)
