"""Co-DETR: auxiliary heads and their positive queries inside the detector, alone and with the other schemes."""

from __future__ import annotations

import pytest
import torch

from models import build_detector, build_model
from models.aux_heads import HEADS
from models.aux_heads.adapter import SingleScaleAdapter
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from util.checkpoint import load_weights
from util.errors import UserError

SIZES = [(128, 128), (96, 114)]
HYBRID = f"{TWO_STAGE} --num_queries_one2many 6 --k_one2many 2"
BOXES = "--with_box_refine --query_pos box"
FORMS = {
    "one_stage": "--aux_heads atss faster_rcnn",
    "two_stage_k1": f"{TWO_STAGE} --mixed_selection --aux_heads atss",
    "with_hybrid_branch": f"{HYBRID} --aux_heads faster_rcnn",
    "all_heads": f"--with_box_refine --aux_heads {' '.join(HEADS)}",
    "one_head_twice": "--aux_heads atss atss --aux_convs 2 --head_embed vector",
    "empty_slots": "--aux_heads atss faster_rcnn --aux_fill masked --roi_samples 16",
    "heads_without_queries": "--aux_heads faster_rcnn --lambda1 0",
    "queries_without_losses_of_heads": "--aux_heads atss --lambda2 0",
    "single_map": "--aux_heads atss faster_rcnn --num_feature_levels 1",
    "boxes": f"{BOXES} --two_stage --mixed_selection --decoder_norm --look_forward_twice --aux_heads faster_rcnn atss "
    "--num_feature_levels 5 --return_interm_indices 0 1 2 3 --cls_target quality --focal_alpha -1 --dn_number 20",
    "learned_boxes": f"{BOXES} --query_scale --aux_heads atss --aux_fill masked",
    "single_map_of_stride_16": "--aux_heads atss --num_feature_levels 1 --dilation --backbone resnet50",
}


@pytest.mark.parametrize("flags", FORMS.values(), ids=list(FORMS))
def test_heads_and_their_queries_train_every_parameter_with_and_without_objects(flags: str) -> None:
    model, criterion, _ = build_model(tiny_args(flags))
    crowd = make_target(torch.rand(150, 4, generator=torch.Generator().manual_seed(0)).mul(0.4).tolist(), [1] * 150)
    for targets in (tiny_targets(), [make_target(), make_target()], [crowd, make_target()]):
        model.zero_grad()
        output = model(tiny_images(SIZES), targets)
        report = criterion(output, targets)
        report.total.backward()
        assert torch.isfinite(report.total)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert torch.isfinite(parameter.grad).all(), f"{name} gets a non-finite gradient"


def test_every_head_has_a_group_taught_with_its_own_pairs() -> None:
    model, criterion, _ = build_model(tiny_args(FORMS["one_stage"]))
    output = model(tiny_images(SIZES), tiny_targets())
    terms = criterion(output, tiny_targets()).terms
    assert list(output.sets) == ["one2one", "co_faster_rcnn", "co_atss"]
    for group in ("co_faster_rcnn", "co_atss"):
        (taught,) = output.sets[group].supervision
        pairs = taught.assign
        assert pairs.count == (pairs.image == 0).sum().item() / 2 > 0  # two layers; the second image has no object
        assert set(pairs.target.tolist()) <= {0, 1}
        assert {f"loss_ce_{group}", f"loss_ce_0_{group}", f"loss_bbox_{group}", f"loss_giou_{group}"} <= set(terms)
    assert {"loss_cls_atss", "loss_centerness_atss", "loss_rpn_cls_faster_rcnn", "acc_faster_rcnn"} <= set(terms)


def test_the_main_queries_do_not_notice_the_auxiliary_ones() -> None:
    for flags in ("", f"{TWO_STAGE} --mixed_selection"):
        plain = build_detector(tiny_args(flags)).train()
        taught = build_detector(tiny_args(f"{flags} --aux_heads atss faster_rcnn")).train()
        taught.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():
            ours, theirs = (m(tiny_images(SIZES), tiny_targets()) for m in (taught, plain))
        assert torch.allclose(ours.pred_logits, theirs.pred_logits, atol=1e-5)
        assert torch.allclose(ours.pred_boxes, theirs.pred_boxes, atol=1e-5)


def test_lambdas_scale_the_losses_of_queries_and_heads() -> None:
    terms = []
    for flags in ("", "--lambda1 0.5 --lambda2 1"):
        torch.manual_seed(0)
        model, criterion, _ = build_model(tiny_args(f"--aux_heads atss {flags}"))
        terms.append(criterion(model(tiny_images(SIZES), tiny_targets()), tiny_targets()).terms)
    for name, value in terms[0].items():
        factor = 0.5 if name.endswith("atss") else 1.0
        assert terms[1][name].item() == pytest.approx(factor * value.item(), rel=1e-5, abs=1e-7), name


def test_without_lambda1_there_are_no_queries_and_no_parameters_for_them() -> None:
    model = build_detector(tiny_args(FORMS["heads_without_queries"]))
    assert list(model(tiny_images(SIZES), tiny_targets()).sets) == ["one2one"]
    assert not [name for name, _ in model.named_parameters() if "queries" in name]


@pytest.mark.parametrize(("stages", "finest"), [("1 2 3", 8), ("0 1 2 3", 4)])
def test_regions_twice_as_large_as_published_look_at_the_finest_map(stages: str, finest: int) -> None:
    flags = f"{BOXES} --num_feature_levels 5 --return_interm_indices {stages} --aux_heads faster_rcnn"
    co = build_detector(tiny_args(flags)).groups["co"]
    assert co.strides == tuple(finest * 2**level for level in range(6))
    assert co.heads["faster_rcnn"].roi.settings.finest_scale == {8: 112, 4: 56}[finest]


def test_a_head_that_is_asked_for_twice_is_two_heads() -> None:
    model = build_detector(tiny_args(FORMS["one_head_twice"]))
    assert list(model.groups["co"].heads) == ["atss", "atss2"]
    assert len(model.groups["co"].heads["atss2"].cls_convs) == 2
    assert list(model(tiny_images(SIZES), tiny_targets()).sets) == ["one2one", "co_atss", "co_atss2"]


def test_in_inference_heads_and_queries_are_silent_unless_a_head_is_evaluated() -> None:
    silent = build_detector(tiny_args(FORMS["one_stage"])).eval()
    with torch.no_grad():
        output = silent(tiny_images(SIZES))
    assert list(output.sets) == ["one2one"] and not output.aux_detections

    alone = build_detector(tiny_args(f"{FORMS['with_hybrid_branch']} --eval --resume x.pth"))
    assert list(alone.groups) == ["one2one"]  # nothing else is built

    model, _, postprocessor = build_model(tiny_args(f"{FORMS['one_stage']} --eval_head atss"))
    with torch.no_grad():
        output = model.eval()(tiny_images(SIZES))
    detections = postprocessor(output, [(256, 256), (10, 20)], [3, 4])
    assert [d.image_id for d in detections] == [3, 4]
    assert all(len(d.scores) > 0 and (d.scores.diff() <= 0).all() for d in detections)
    assert detections[1].boxes_px.max() <= 20 and detections[1].boxes_px[:, 3].max() <= 10


@pytest.mark.parametrize("stride", [16, 32])
def test_a_single_map_becomes_a_pyramid_of_strides_8_to_64(stride: int) -> None:
    adapter = SingleScaleAdapter(32, stride)
    maps = adapter(torch.randn(2, 32, 192 // stride, 320 // stride))
    assert [tuple(m.shape[-2:]) for m in maps] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_doubled_map_covers_a_map_of_odd_size() -> None:
    shapes = [tuple(m.shape[-2:]) for m in SingleScaleAdapter(32, 32)(torch.randn(1, 32, 3, 5))]
    assert shapes == [(12, 20), (6, 10), (3, 5), (2, 3)]


def test_only_the_evaluated_head_detects() -> None:
    model = build_detector(tiny_args(f"{FORMS['one_stage']} --eval_head faster_rcnn")).eval()
    with torch.no_grad():
        assert list(model(tiny_images(SIZES)).aux_detections) == ["faster_rcnn"]


def test_training_without_targets_says_what_is_missing() -> None:
    model = build_detector(tiny_args(FORMS["one_stage"]))
    with pytest.raises(ValueError, match="call the detector with targets"):
        model(tiny_images(SIZES))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--aux_heads atss --dilation", "only with --num_feature_levels 1"),
        ("--eval_head atss", "--eval_head atss: needs --aux_heads atss"),
        ("--aux_heads atss atss --eval_head fcos", "these flags make the heads atss, atss2"),
        ("--aux_heads atss --max_pos_coords 0", "at least 1"),
        ("--aux_heads faster_rcnn --roi_samples 8", "give at least 9"),
        ("--aux_heads atss --lambda1 0 --lambda2 0", "teach nothing"),
        ("--aux_heads atss --eval_head atss --nms_iou 0.5", "NMS of their own"),
        ("--aux_heads atss --eval_group co", "evaluated with --eval_head NAME"),
        ("--aux_heads atss --lambda1 -1", "0 or more"),
        (f"{BOXES} --aux_heads atss --head_embed vector", "with --query_pos box they give none"),
        ("--focal_alpha -0.5", "or -1 for no balance"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


@pytest.mark.parametrize(
    ("theirs", "ours", "advice"),
    [
        ("", "--aux_heads atss", "the file has no auxiliary heads .* leave out --aux_heads"),
        ("--aux_heads faster_rcnn atss", "--aux_heads atss", "use --aux_heads atss faster_rcnn"),
        ("--aux_heads atss", "--aux_heads atss --lambda1 0", "leave out --lambda1 0"),
        ("--aux_heads atss --lambda1 0", "--aux_heads atss", "add --lambda1 0"),
        ("--aux_heads atss --aux_convs 2", "--aux_heads atss", "use --aux_convs 2"),
    ],
)
def test_a_file_with_other_heads_is_refused_with_the_flags_to_change(theirs: str, ours: str, advice: str) -> None:
    file, model = (build_detector(tiny_args(flags)) for flags in (theirs, ours))
    with pytest.raises(UserError, match=f"try: .*{advice}"):
        load_weights(model, file.state_dict())


def test_a_head_finds_its_queries_in_a_file_of_more_heads() -> None:
    file = build_detector(tiny_args("--aux_heads faster_rcnn atss"))
    model = build_detector(tiny_args("--aux_heads atss"))
    load_weights(model, file.state_dict(), strict=False)
    for name, value in model.groups["co"].queries.state_dict().items():
        assert torch.equal(value, file.groups["co"].queries.state_dict()[name]), name
