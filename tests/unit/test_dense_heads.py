"""What holds for every dense auxiliary head, and what they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.aux_heads.atss import ATSSHead
from models.aux_heads.base import AuxHead, Objects, Pyramid
from models.aux_heads.dense import detect, one_hot, sum_by_level
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.fcos import FCOSHead
from models.aux_heads.gfl import GFLHead
from models.aux_heads.paa import PAAHead
from models.aux_heads.retinanet import RetinaNetHead
from tests.unit.small_pyramid import build, some_objects, some_pyramid
from tests.waits import Waits

HEADS = [ATSSHead, RetinaNetHead, FCOSHead, PAAHead, GFLHead]


def crowd(number: int) -> list[tuple[float, float, float, float]]:
    corners, sides = torch.rand(number, 2) * torch.tensor([70.0, 40.0]), 10 + 20 * torch.rand(number, 2)
    return [tuple(box) for box in torch.cat([corners, corners + sides], 1).tolist()]


@pytest.mark.parametrize("numbers", [(0, 0), (1, 0), (400, 3)], ids=["none", "one", "hundreds"])
@pytest.mark.parametrize("head", HEADS)
def test_losses_are_finite_and_reach_every_parameter(head: type[AuxHead], numbers: tuple[int, int]) -> None:
    head, pyramid = build(head), some_pyramid([(64, 96), (50, 60)])
    for level in pyramid.maps:
        level.requires_grad_()
    output = head(pyramid, some_objects(*map(crowd, numbers)))
    sum(value.sum() for value in output.losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A level without positives has nothing to scale.
        assert numbers[0] < 400 or "scales" in name or parameter.grad.abs().sum() > 0, name
    assert all(level.grad.isfinite().all() for level in pyramid.maps)
    for positive, number in zip(output.samples.positive, numbers):
        assert positive.any() == (number > 0)
    assert not (output.samples.positive & output.samples.negative).any()
    assert (output.samples.target[~output.samples.positive] == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_losses_are_float32_under_mixed_precision_and_nearly_the_same(head: type[AuxHead]) -> None:
    head, pyramid, objects = build(head), some_pyramid([(64, 96)]), some_objects(crowd(3))
    exact = head(pyramid, objects).losses
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(pyramid, objects).losses
    for name, value in mixed.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.01)


@pytest.mark.parametrize("head", HEADS)
def test_no_operator_of_a_training_step_waits_for_the_device(head: type[AuxHead]) -> None:
    head, pyramid, objects = build(head), some_pyramid([(64, 96), (50, 60)]), some_objects(crowd(3), crowd(1))
    with Waits() as waits:
        sum(value.sum() for value in head(pyramid, objects).losses.values()).backward()
    assert not waits.found


@pytest.mark.parametrize("head", HEADS)
def test_training_never_asks_the_device(head: type[AuxHead]) -> None:
    """On the meta device there are no values: whatever would wait for one fails."""
    pyramid, objects = some_pyramid([(64, 96), (50, 60)]), some_objects(crowd(3), crowd(1))
    pyramid.maps = [level.to("meta") for level in pyramid.maps]
    objects = Objects(objects.labels.to("meta"), objects.boxes.to("meta"), objects.valid.to("meta"), objects.counts)
    output = build(head).to("meta")(pyramid, objects)
    assert all(value.is_meta for value in output.losses.values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        output.samples.positive.nonzero()  # a wait is indeed an error here


@pytest.mark.parametrize("head", [*HEADS, FasterRCNNHead])
def test_the_logits_are_those_of_the_samples_row_by_row(head: type[AuxHead]) -> None:
    pyramid, objects = some_pyramid([(64, 96), (50, 60)]), some_objects(crowd(4), crowd(2))
    output = build(head)(pyramid, objects)
    samples, logits = output.samples, output.logits
    assert logits.shape[:2] == samples.positive.shape and logits.shape[2] == 3 + (head is FasterRCNNHead)
    (slope,) = torch.autograd.grad(output.losses["loss_cls"].sum(), logits)
    own = torch.zeros_like(slope, dtype=torch.bool).scatter_(
        2, objects.labels.gather(1, samples.target)[..., None], samples.positive[..., None]
    )
    # The class loss falls where the logit of a positive's own class rises, and nowhere else (but for the background).
    assert own.any() and (slope[own] < 0).all()
    assert (slope[..., :3][~own[..., :3]] >= 0).all() and (slope[samples.positive[..., None] & ~own] > 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_an_image_is_treated_alike_whatever_the_others_hold(head: type[AuxHead]) -> None:
    """Padding to the most objects and usable cells belong to each image alone."""
    head, pyramid = build(head).eval(), some_pyramid([(64, 96), (50, 60)])
    together = head(pyramid, some_objects(crowd(20), [(5, 8, 40, 45), (20, 10, 30, 40)])).samples
    alone = Pyramid([m[1:] for m in pyramid.maps], pyramid.strides, pyramid.sizes[1:], pyramid.usable[1:], (64, 96))
    alone = head(alone, some_objects([(5, 8, 40, 45), (20, 10, 30, 40)])).samples
    for name in ("boxes", "positive", "negative", "target"):
        assert torch.equal(getattr(together, name)[1], getattr(alone, name)[0]), name


@pytest.mark.parametrize("head", [ATSSHead, RetinaNetHead, PAAHead, GFLHead])
def test_anchors_outside_the_image_are_zero_boxes_and_out_of_the_losses(head: type[AuxHead]) -> None:
    head, objects = build(head), some_objects([(5, 8, 40, 30)])
    pyramid = some_pyramid([(32, 48)])
    output = head(pyramid, objects)
    outside = ~head.grid.usable(pyramid.shapes, pyramid.usable, "cpu")
    assert outside.any() and output.samples.negative[outside].all()
    assert (output.samples.boxes[outside] == 0).all() and (output.samples.boxes[~outside] != 0).any(-1).all()
    for level in pyramid.maps:
        level.requires_grad_()
    head.cls_convs = head.reg_convs = nn.Identity()  # GroupNorm would tie all cells together
    sum(value.sum() for value in head(pyramid, objects).losses.values()).backward()
    assert (pyramid.maps[0].grad[0, :, 5:] == 0).all() and (pyramid.maps[0].grad[0, :, :, 7:] == 0).all()
    assert (pyramid.maps[0].grad[0, :, :4, :6] != 0).any()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_detects_what_it_was_taught(head: type[AuxHead]) -> None:
    head, pyramid = build(head), some_pyramid([(64, 96), (50, 60)])
    objects = some_objects([(10, 8, 50, 44), (60, 20, 90, 60)], [(12, 6, 48, 44)])
    optimiser = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(100):
        optimiser.zero_grad()
        sum(value.sum() for value in head(pyramid, objects).losses.values()).backward()
        optimiser.step()
    for found, boxes, count in zip(head.predict(pyramid), objects.boxes, objects.counts):
        assert len(found.scores) <= 100 and (found.scores.diff() <= 0).all()
        best = found.boxes_px[:count][found.labels[:count].argsort()]
        assert sorted(found.labels[:count].tolist()) == list(range(count))
        assert (best - boxes[:count]).abs().max() < 6


@pytest.mark.parametrize(
    ("head", "branch"), [(ATSSHead, "atss_centerness"), (PAAHead, "atss_centerness"), (FCOSHead, "conv_centerness")]
)
def test_boxes_that_a_head_thinks_ill_placed_score_nothing(head: type[AuxHead], branch: str) -> None:
    head, pyramid = build(head), some_pyramid([(40, 50)])
    nn.init.constant_(getattr(head, branch).bias, -20.0)
    assert head.predict(pyramid)[0].scores.max() < 1e-6


@pytest.mark.parametrize("head", HEADS)
def test_initial_values_are_the_published_ones(head: type[AuxHead]) -> None:
    head = build(head)
    (classifier,) = (getattr(head, n) for n in ("atss_cls", "retina_cls", "conv_cls", "gfl_cls") if hasattr(head, n))
    convs = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 4 + isinstance(head, ATSSHead | PAAHead | FCOSHead)
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1) and conv.weight.mean().abs() < 2e-3
        if conv.bias is not None:
            assert torch.allclose(conv.bias.detach(), torch.tensor(-4.59512 if conv is classifier else 0.0))
    assert all(scale.scale == 1 for scale in getattr(head, "scales", []))


@pytest.mark.parametrize("head", HEADS)
def test_detections_are_clipped_to_the_image(head: type[AuxHead]) -> None:
    (found,) = build(head).predict(some_pyramid([(40, 50)]))
    assert 0 < len(found.scores) <= 100
    assert found.boxes_px.min() >= 0 and found.boxes_px[:, 2].max() <= 50 and found.boxes_px[:, 3].max() <= 40


def detections(scores: Tensor, boxes: list, **more) -> tuple[list[float], list[int]]:
    (found,) = detect(
        scores[None], torch.tensor([boxes], dtype=torch.float32), pyramid=some_pyramid([(64, 96)]), **more
    )
    return pytest.approx(found.scores.tolist()), found.labels.tolist()


def test_detection_keeps_the_best_of_each_level_and_class() -> None:
    # Anchors 0 and 1 overlap, anchor 2 is elsewhere, anchor 3 is on the second level.
    boxes = [(0, 0, 20, 20), (1, 0, 21, 20), (40, 0, 60, 20), (0, 40, 20, 60)]
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.6, 0.0], [0.2, 0.3]])
    kept = detections(scores, boxes, counts=[3, 1], nms_iou=0.5)
    assert kept == ([0.9, 0.7, 0.6, 0.3, 0.2, 0.0], [0, 1, 0, 1, 0, 1])
    kept = detections(scores, boxes, counts=[3, 1], nms_iou=0.5, per_level=1)
    assert kept == ([0.9, 0.3], [0, 1])
    kept = detections(scores, boxes, counts=[3, 1], nms_iou=0.5, topk=2)
    assert kept == ([0.9, 0.7], [0, 1])


def test_quality_reorders_after_the_selection_by_score() -> None:
    boxes = [(0, 0, 20, 20), (1, 0, 21, 20), (40, 0, 60, 20)]
    scores, quality = torch.tensor([[0.9], [0.8], [0.6]]), torch.tensor([[0.5, 0.9, 1.0]])
    kept = detections(scores, boxes, counts=[3], nms_iou=0.5, quality=quality, per_level=2)
    assert kept == ([0.72], [0])  # the third has the best product among the rest, but was not selected


def test_sums_by_level_and_targets_of_classes() -> None:
    assert sum_by_level(torch.tensor([[1.0, 2, 3], [4, 5, 6]]), [2, 1]).tolist() == [12, 9]
    found = one_hot(torch.tensor([[1, 0]]), torch.tensor([[True, False]]), 2)
    assert found.tolist() == [[[0, 1], [0, 0]]]
