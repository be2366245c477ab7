"""Faster R-CNN as an auxiliary head: sampling, proposals, regions, losses, detections."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from models.aux_heads import sampling
from models.aux_heads.base import Objects, Pyramid
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.roi import RoISettings, pool_regions, region_levels
from models.aux_heads.rpn import ProposalRule, Proposals, RPNSettings, _survivors, _survivors_at_once
from tests.waits import Waits

WIDTH, CLASSES, STRIDES = 8, 3, (8, 16, 32)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random choice takes the first."""
    monkeypatch.setattr(sampling, "random_keys", lambda shape, device: torch.arange(shape[1]).float().expand(shape))


def make_head(*, samples: int = 32, **roi) -> FasterRCNNHead:
    torch.manual_seed(0)
    rpn = RPNSettings(samples=samples, training=ProposalRule(100, 40), testing=ProposalRule(100, 30))
    roi = RoISettings(hidden=16, samples=samples, **roi)
    return FasterRCNNHead(num_classes=CLASSES, width=WIDTH, strides=STRIDES, rpn=rpn, roi=roi)


def silent(head: FasterRCNNHead) -> FasterRCNNHead:
    """All weights 0: every logit and every delta is 0."""
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


def make_pyramid(sizes: tuple[tuple[int, int], ...] = ((128, 128),), canvas: int = 128) -> Pyramid:
    torch.manual_seed(1)
    maps = [torch.randn(len(sizes), WIDTH, canvas // s, canvas // s, requires_grad=True) for s in STRIDES]
    return Pyramid(maps, STRIDES, list(sizes), usable=list(sizes), canvas=(canvas, canvas))


def make_objects(*images: list[tuple[float, ...]]) -> Objects:
    """Boxes xyxy in pixels of each image; labels count 0, 1, 2, 0, ..."""
    counts = [len(boxes) for boxes in images]
    most = max(1, *counts)
    boxes = torch.zeros(len(images), most, 4)
    for row, own in zip(boxes, images):
        row[: len(own)] = torch.tensor(own).reshape(-1, 4)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    return Objects(torch.arange(most) % CLASSES * valid, boxes, valid, counts)


def make_proposals(*images: list[tuple[float, ...]]) -> Proposals:
    objects = make_objects(*images)
    return Proposals(objects.boxes, objects.valid)


def with_gaps(proposals: Proposals) -> Proposals:
    """Append nine places without a proposal."""
    pad = torch.nn.functional.pad
    return Proposals(pad(proposals.boxes, (0, 0, 0, 9)), pad(proposals.valid, (0, 9)))


# --- proposals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("survivors", [_survivors, _survivors_at_once])
def test_nms_looks_at_one_image_and_one_level_at_a_time(survivors) -> None:
    box = torch.tensor([0.0, 0, 20, 20])
    boxes = torch.stack([box, box, box + 40, box]).expand(2, -1, -1)  # all but the third are equal
    scores = torch.tensor([[0.5, 0.9, 0.1, 0.4], [0.9, 0.5, 0.1, 0.4]])
    level = torch.tensor([0, 0, 0, 1])
    survive = survivors(boxes, scores, level, canvas=(60, 60), nms_iou=0.7)
    assert survive.tolist() == [[False, True, True, True], [True, False, True, True]]


def test_nms_of_a_large_batch_in_several_calls_is_the_same(monkeypatch) -> None:
    torch.manual_seed(0)
    corner, size = torch.rand(5, 40, 2) * 50, torch.rand(5, 40, 2) * 50
    boxes, scores, level = torch.cat([corner, corner + size], -1), torch.rand(5, 40), torch.arange(40) // 20
    whole = _survivors(boxes, scores, level, canvas=(100, 100), nms_iou=0.5)
    assert torch.equal(_survivors_at_once(boxes, scores, level, canvas=(100, 100), nms_iou=0.5), whole)
    monkeypatch.setattr("models.aux_heads.rpn.BOXES_PER_NMS", 80)
    assert torch.equal(_survivors_at_once(boxes, scores, level, canvas=(100, 100), nms_iou=0.5), whole)
    assert 0 < whole.sum() < whole.numel()


def test_proposals_lie_in_their_image_come_from_the_padding_too_and_descend_in_score() -> None:
    head, pyramid = silent(make_head()), make_pyramid(((128, 128), (60, 90)))
    counts = head.rpn.grid.level_counts(pyramid.shapes)
    logits, deltas = torch.full((2, sum(counts)), -5.0), torch.zeros(2, sum(counts), 4)
    # Anchors of 32 x 32 (number 3 of a cell) at the cells (2, 2), (6, 6), (8, 9) and (15, 15) of the first level.
    for column, row, logit in ((2, 2, 2.0), (6, 6, 1.0), (9, 8, 3.0), (15, 15, 4.0)):
        logits[:, (row * 16 + column) * 9 + 3] = logit
    found = head.rpn.propose(pyramid, logits, deltas, ProposalRule(4, 1000))
    assert found.boxes[0, :4].tolist() == [
        [104, 104, 128, 128], [56, 48, 88, 80], [0, 0, 32, 32], [32, 32, 64, 64]
    ]  # fmt: skip
    # In the second image the first is empty and gone, and the others are cut; (9, 8) begins in its padding.
    assert found.boxes[1, :3].tolist() == [[56, 48, 88, 60], [0, 0, 32, 32], [32, 32, 64, 60]]
    assert not found.boxes[~found.valid].any()
    whole = found.boxes[1][found.valid[1]]
    assert (whole[:, 2:] > whole[:, :2]).all() and (whole[:, 2:] <= torch.tensor([90, 60])).all()


def test_each_level_sends_its_best_candidates_and_each_image_keeps_the_best() -> None:
    head, pyramid = silent(make_head()), make_pyramid()
    counts = head.rpn.grid.level_counts(pyramid.shapes)
    logits, deltas = torch.randn(1, sum(counts)), torch.zeros(1, sum(counts), 4)
    logits[:, : counts[0]] += 20  # the finest level is better than all others
    without_nms = head.rpn.propose(pyramid, logits, deltas, ProposalRule(5, 1000, nms_iou=1.0))
    assert without_nms.valid.sum() == 15
    best = head.rpn.propose(pyramid, logits, deltas, ProposalRule(5, 7, nms_iou=1.0))
    assert torch.equal(best.boxes, without_nms.boxes[:, :7])


# --- losses of the first stage ----------------------------------------------------------------------------------------


def test_rpn_losses_of_one_object_by_hand(in_order) -> None:
    head, pyramid = silent(make_head()), make_pyramid()
    # 2 pixels beside the 32 x 32 anchor at (64, 64): IoU 30 / 34. The next one, at (72, 64), has 26 / 38 < 0.7.
    losses, _ = head.rpn(pyramid, make_objects([(50.0, 48, 82, 80)]))
    # 1 positive and 31 negatives, which come first in order: all on the finest level.
    torch.testing.assert_close(losses["loss_rpn_cls"], torch.tensor([math.log(2), 0, 0]))
    torch.testing.assert_close(losses["loss_rpn_bbox"], torch.tensor([2 / 32 / 32, 0, 0]))


def test_an_image_without_positives_counts_one_in_the_divisor_of_the_rpn(in_order) -> None:
    head, pyramid = silent(make_head()), make_pyramid(((128, 128), (128, 128)))
    losses, _ = head.rpn(pyramid, make_objects([], [(50.0, 48, 82, 80)]))
    expected = 64 * math.log(2) / (32 + 1 + 32)
    assert losses["loss_rpn_cls"].sum().item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_rpn_bbox"].sum().item() == pytest.approx(2 / 32 / 65, rel=1e-4)


def test_rpn_losses_are_listed_by_the_level_of_the_anchor(in_order) -> None:
    head, pyramid = silent(make_head()), make_pyramid()
    # 128 x 128 is a square anchor of the coarsest level only, at the corner of its cell (2, 2).
    losses, _ = head.rpn(pyramid, make_objects([(2.0, 0, 128, 128)]))
    box, classes = losses["loss_rpn_bbox"], losses["loss_rpn_cls"]
    assert box[0] == 0 and box[2] > 0 and classes[2] > 0


def test_every_anchor_counts_in_its_own_level() -> None:
    head, pyramid = silent(make_head(samples=100_000)), make_pyramid()
    losses, proposals = head.rpn(pyramid, make_objects([]))
    cells = torch.tensor([256.0, 64, 16])
    expected = math.log(2) * 9 * cells / (9 * cells.sum() + 1)
    torch.testing.assert_close(losses["loss_rpn_cls"], expected, rtol=1e-5, atol=0)
    assert not proposals.boxes.requires_grad


def test_anchors_outside_the_usable_part_are_not_sampled() -> None:
    head, pyramid = make_head(samples=100_000), make_pyramid(((128, 128), (40, 56)))
    picked, _ = head.rpn.choose(pyramid, make_objects([], []))
    # ceil(40 / s) * ceil(56 / s) cells of 9 anchors.
    assert picked.taken.sum(1).tolist() == [(256 + 64 + 16) * 9, (5 * 7 + 3 * 4 + 2 * 2) * 9]


# --- regions ----------------------------------------------------------------------------------------------------------


def test_a_region_moves_up_one_map_with_each_doubling_of_its_side() -> None:
    sides = torch.tensor([0.0, 10, 111, 223, 224, 447, 448, 895, 896, 5000])
    boxes = torch.stack([sides * 0, sides * 0, sides * 2, sides / 2], -1)  # twice as wide, half as high: same area
    assert region_levels(boxes, finest_scale=112, levels=4).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_a_region_on_a_ramp_reads_the_middle_of_each_cell() -> None:
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # value = column
    pooled = pool_regions([ramp], [8], torch.tensor([[[16.0, 16, 72, 72]]]), finest_scale=112)
    # 56 pixels are 7 columns: from 2 to 8, whose middles are the columns themselves.
    torch.testing.assert_close(pooled, torch.arange(2.0, 9).expand(1, 1, 1, 7, 7))


def test_regions_and_their_gradients_are_those_of_one_map_each() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, n, n, dtype=torch.float64, requires_grad=True) for n in (32, 16, 8)]
    corner, size = torch.rand(2, 20, 2) * 100, torch.rand(2, 20, 2) * 250
    boxes = torch.cat([corner, corner + size], -1)
    levels = region_levels(boxes, finest_scale=40, levels=3)
    assert len(levels.unique()) == 3
    ours = pool_regions(maps, (8, 16, 32), boxes, finest_scale=40)
    expected = torch.stack(
        [
            torch.cat([_one_region(maps, (8, 16, 32), b, image, int(i)) for b, i in zip(boxes[image], levels[image])])
            for image in range(2)
        ]
    )
    torch.testing.assert_close(ours, expected)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), maps), torch.autograd.grad((expected * weight).sum(), maps)
    )


def _one_region(maps: list[Tensor], strides: tuple[int, ...], box: Tensor, image: int, level: int) -> Tensor:
    own = maps[level][image : image + 1]
    return roi_align(own, [box.double()[None]], 7, 1 / strides[level], sampling_ratio=-1, aligned=True)


def test_the_second_stage_leaves_out_the_coarsest_map() -> None:
    head, pyramid = make_head(finest_scale=16), make_pyramid()
    # 128 pixels are three doublings of 16: they would ask for a fourth map, and get the last one that is used.
    losses = head.roi(pyramid, make_objects([(0.0, 0, 128, 128)]), make_proposals([(1.0, 1, 120, 120)])).losses
    grads = torch.autograd.grad(sum(losses.values()), pyramid.maps, allow_unused=True)
    assert not grads[0].any() and grads[1].any() and grads[2] is None


# --- losses and samples of the second stage ---------------------------------------------------------------------------


def test_roi_losses_by_hand(in_order) -> None:
    head, pyramid = silent(make_head(samples=8, fraction=0.5)), make_pyramid()
    # IoU with the object: itself 1, 0.8, none. With deltas of 0 the boxes are the regions, so GIoU = IoU.
    objects = make_objects([(10.0, 10, 50, 50)])
    proposals = with_gaps(make_proposals([(10.0, 10, 50, 42), (60.0, 60, 90, 90)]))
    output = head.roi(pyramid, objects, proposals)
    samples, losses = output.samples, output.losses
    assert losses["loss_cls"].item() == pytest.approx(math.log(CLASSES + 1))
    assert losses["loss_bbox"].item() == pytest.approx(10 * 0.2 / 3, rel=1e-5)
    # Equal logits: class 0 wins, which is right for the two positives.
    assert output.logs["acc"].item() == pytest.approx(200 / 3)
    with torch.no_grad():
        head.roi.fc_cls.bias[-1] = 1.0
    # Now all are background: right for one of the three; the five empty slots do not count.
    assert head.roi(pyramid, objects, proposals).logs["acc"].item() == pytest.approx(100 / 3)
    assert samples.positive[0, :3].tolist() == [True, True, False]
    assert samples.negative[0, :3].tolist() == [False, False, True]


def test_the_box_of_the_own_class_is_taught(in_order) -> None:
    head, pyramid = silent(make_head()), make_pyramid()
    objects = make_objects([(0.0, 0, 9, 9), (10.0, 10, 50, 50)])  # labels 0 and 1
    losses = head.roi(pyramid, objects, make_proposals([(10.0, 10, 50, 42)])).losses
    losses["loss_bbox"].backward()
    moved = head.roi.fc_reg.bias.grad.view(CLASSES, 4).abs().sum(1)
    assert moved[1] > 0 and moved[2] == 0


def test_samples_put_positives_first_and_are_cut_to_the_smallest_image(in_order) -> None:
    head, pyramid = make_head(samples=16), make_pyramid(((128, 128), (128, 128)))
    objects = make_objects([(10.0, 10, 50, 50)], [(20.0, 20, 60, 60), (70.0, 70, 90, 90)])
    far = [(100.0 + i, 100, 120, 120) for i in range(6)]
    proposals = make_proposals([*far, (11.0, 10, 50, 50)], [far[0]])
    samples = head.roi(pyramid, objects, proposals).samples
    there = samples.positive | samples.negative
    assert there.sum(1).tolist() == [3, 3] and there[:, :3].all()
    assert samples.positive[:, :3].tolist() == [[True, True, False], [True, True, False]]
    assert samples.target[:, :3].tolist() == [[0, 0, 0], [0, 1, 0]]
    assert samples.boxes[0, :3].tolist() == [[10, 10, 50, 50], [11, 10, 50, 50], [100, 100, 120, 120]]
    pooled = pool_regions(pyramid.maps[:2], STRIDES[:2], samples.boxes, finest_scale=112)
    torch.testing.assert_close(samples.features, pooled.mean((-1, -2)))
    assert not samples.boxes[0, 8:].any() and samples.boxes[0, 7].any()  # 8 were sampled, the other slots are empty
    assert samples.features.requires_grad and not samples.boxes.requires_grad


def test_places_without_a_proposal_change_nothing(in_order) -> None:
    head, pyramid = make_head(samples=16), make_pyramid()
    objects = make_objects([(10.0, 10, 50, 50)])
    short = make_proposals([(11.0, 10, 50, 50), (60.0, 60, 90, 90)])
    long = with_gaps(short)
    for name, loss in head.roi(pyramid, objects, short).losses.items():
        torch.testing.assert_close(head.roi(pyramid, objects, long).losses[name], loss)


# --- the whole head ---------------------------------------------------------------------------------------------------


def crowd(count: int) -> list[tuple[float, ...]]:
    torch.manual_seed(3)
    corner, size = torch.rand(count, 2) * 90, 4 + torch.rand(count, 2) * 30
    return torch.cat([corner, corner + size], 1).tolist()


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "images",
    [([], []), (crowd(1), []), (crowd(300), crowd(2)), ([(0.0, 0, 1, 1)], [])],
    ids=["no objects", "one object", "300 objects", "no anchor fits"],
)
def test_losses_are_finite_float32_and_reach_every_parameter(images, autocast) -> None:
    head, pyramid = make_head(), make_pyramid(((128, 128), (100, 70)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = head(pyramid, make_objects(*images))
    assert {k: tuple(v.shape) for k, v in output.losses.items()} == {
        "loss_rpn_cls": (3,), "loss_rpn_bbox": (3,), "loss_cls": (), "loss_bbox": ()
    }  # fmt: skip
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in output.losses.values())
    (sum(v.sum() for v in output.losses.values()) + output.samples.features.sum()).backward()
    for name, parameter in [*head.named_parameters(), *((f"map {i}", m) for i, m in enumerate(pyramid.maps))]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not any(images):
        assert output.losses["loss_bbox"] == 0 and not output.samples.positive.any()


def test_half_precision_maps_of_autocast_give_float32_features_and_nearly_the_same_losses(in_order) -> None:
    head, pyramid, objects = make_head(), make_pyramid(), make_objects(crowd(3))
    half = dataclasses.replace(pyramid, maps=[m.bfloat16() for m in pyramid.maps])
    proposals = make_proposals(crowd(9))
    expected = head.roi(pyramid, objects, proposals).losses
    with torch.autocast("cpu", torch.bfloat16):
        output = head.roi(half, objects, proposals)
        scores = [*head.roi.classify(half, proposals.boxes), *head.rpn.score(half)]
    assert {output.samples.features.dtype, *(v.dtype for v in scores)} == {torch.float32}
    torch.testing.assert_close(output.losses, expected, rtol=0.02, atol=0)


def test_gradients_do_not_flow_through_the_proposals() -> None:
    head, pyramid = make_head(), make_pyramid()
    output = head(pyramid, make_objects(crowd(3)))
    reached = torch.autograd.grad(
        output.losses["loss_cls"] + output.losses["loss_bbox"], list(head.rpn.parameters()), allow_unused=True
    )
    assert reached == (None,) * 6


def test_a_training_step_waits_for_the_device_once(monkeypatch) -> None:
    monkeypatch.setattr("models.aux_heads.rpn._survivors", _survivors_at_once)  # what a GPU takes
    head, pyramid, objects = make_head(), make_pyramid(((128, 128), (100, 70))), make_objects(crowd(5), crowd(2))
    with Waits() as waits:
        output = head(pyramid, objects)
        sum(v.sum() for v in output.losses.values()).backward()
    assert waits.found == {"nms": 1}
    with Waits() as waits:  # the counter does see them
        head.predict(pyramid)
        objects.boxes[objects.valid].sum().item()
    assert waits.found["nonzero"] and waits.found["_local_scalar_dense"] and waits.found["index"]


# --- detections -------------------------------------------------------------------------------------------------------


def test_detections_are_the_best_of_each_class_after_nms() -> None:
    head, pyramid = silent(make_head()), make_pyramid(((64, 100),))
    with torch.no_grad():
        head.roi.fc_cls.bias.copy_(torch.tensor([2.0, 1.0, -30.0, 0.0]).log_softmax(0))
    # The second overlaps the first by 0.9; the third reaches beyond the image.
    proposals = make_proposals([(0.0, 0, 40, 40), (0.0, 0, 40, 36), (60.0, 40, 120, 80)])
    (found,) = head.roi.predict(pyramid, proposals)
    odds = torch.tensor([math.exp(2), math.e]) / (math.exp(2) + math.e + 1)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(found.scores[:4], odds.repeat_interleave(2), rtol=1e-5, atol=1e-6)
    boxes = found.boxes_px[:2]
    boxes = boxes[boxes[:, 0].argsort()].tolist()
    assert boxes == [[0, 0, 40, 40], [60, 40, 100, 64]]


def test_no_more_detections_than_asked_for_and_none_without_a_proposal() -> None:
    head, pyramid = make_head(keep=4), make_pyramid(((128, 128), (128, 128)))
    proposals = make_proposals([(10.0 * i, 0, 10.0 * i + 8, 8) for i in range(5)], [])
    many, none = head.roi.predict(pyramid, proposals)
    assert len(many.scores) == 4 and (many.scores.diff() <= 0).all()
    assert len(none.scores) == len(none.labels) == 0 and none.boxes_px.shape == (0, 4)


def test_the_head_alone_detects_inside_the_images() -> None:
    head, sizes = make_head().eval(), ((128, 128), (60, 90))
    for found, (height, width) in zip(head.predict(make_pyramid(sizes)), sizes):
        assert 0 < len(found.scores) <= 100
        assert (found.boxes_px >= 0).all() and (found.boxes_px <= torch.tensor([width, height] * 2)).all()


# --- construction -----------------------------------------------------------------------------------------------------


def test_parameters_have_the_published_names_shapes_and_initial_values() -> None:
    torch.manual_seed(0)
    head = FasterRCNNHead(num_classes=80)
    state = head.state_dict()
    shapes = {
        "rpn.rpn_conv": (256, 256, 3, 3),
        "rpn.rpn_cls": (9, 256, 1, 1),
        "rpn.rpn_reg": (36, 256, 1, 1),
        "roi.shared_fcs.0": (1024, 12544),
        "roi.shared_fcs.1": (1024, 1024),
        "roi.fc_cls": (81, 1024),
        "roi.fc_reg": (320, 1024),
    }
    assert {n: tuple(v.shape) for n, v in state.items() if n.endswith("weight")} == {
        f"{name}.weight": shape for name, shape in shapes.items()
    }
    assert all(v.abs().max() == 0 for n, v in state.items() if n.endswith("bias"))
    for name in shapes:
        weight = state[f"{name}.weight"]
        if "fcs" in name:  # uniform within sqrt(6 / (in + out))
            assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=1e-3)
        else:
            assert weight.std().item() == pytest.approx(0.001 if name == "roi.fc_reg" else 0.01, rel=0.05)


def test_one_map_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FasterRCNNHead(num_classes=3, strides=(8,))
