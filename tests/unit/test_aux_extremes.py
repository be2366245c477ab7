"""Auxiliary heads on batches that break detectors: one object, hundreds, none that fits, odd sizes, half precision."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.aux_heads import HEADS
from tests.tiny import make_target, tiny_args, tiny_images
from util.engine import StepSettings
from util.structures import ImageBatch, LossReport, Target

ALL = f"--num_feature_levels 3 --with_box_refine --aux_heads {' '.join(HEADS)}"
SIZES = ((128, 128), (96, 114))
CPU = torch.device("cpu")


def crowd(count: int) -> Target:
    torch.manual_seed(0)
    sides = 0.02 + 0.2 * torch.rand(count, 2)
    return make_target(torch.cat([torch.rand(count, 2), sides], 1).tolist(), [i % 4 for i in range(count)])


def one_step(images: ImageBatch, targets: list[Target], amp: str = "off") -> tuple[dict[str, int], LossReport]:
    """Train all heads on a batch; return how many positive queries each has, and the losses.

    Everything must be finite and every parameter must get a gradient.
    """
    model, criterion, _ = build_model(tiny_args(ALL))
    with StepSettings(amp).autocast(CPU):
        output = model(images, targets)
        report = criterion(output, targets)
    report.total.backward()
    assert report.total.dtype == torch.float32 and report.total.isfinite()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), f"{name} gets a gradient that is not finite"
    groups = {name.removeprefix("co_"): s for name, s in output.sets.items() if name.startswith("co_")}
    assert list(groups) == list(HEADS)
    for name, group in groups.items():
        assert 9 <= group.predictions.logits.shape[2] <= 300, name
    return {name: int(group.supervision[0].assign.count) for name, group in groups.items()}, report


def test_one_object_in_a_batch_of_one_image_has_positives_of_every_head() -> None:
    positives, _ = one_step(tiny_images([(128, 128)]), [make_target([[0.5, 0.5, 0.5, 0.4]], [2])])
    assert all(positives.values()), positives


def test_four_hundred_objects_in_an_image_fill_the_queries_and_no_more() -> None:
    positives, _ = one_step(tiny_images(SIZES), [crowd(400), crowd(1)])
    # At most 300 queries of an image; of 512 regions at most a quarter are positives.
    assert max(positives.values()) >= 300
    assert 128 <= positives["faster_rcnn"] <= 2 * 128


# Where a head has no positive its losses of boxes are 0, and it still learns what background is.
BOX_LOSSES = {
    "faster_rcnn": ("loss_rpn_bbox",),
    "atss": ("loss_bbox", "loss_centerness"),
    "retinanet": ("loss_bbox",),
    "fcos": ("loss_bbox", "loss_centerness"),
    "paa": ("loss_bbox", "loss_iou"),
    "gfl": ("loss_bbox", "loss_dfl"),
}
UNFIT = {
    # No centre of a cell or of an anchor lies in it; heads that give every object its best anchors still find some.
    "smaller than every anchor": ([0.4102, 0.4102, 0.002, 0.002], ("atss", "fcos", "gfl")),
    "outside every anchor": ([40.0, 40.0, 0.1, 0.1], ("atss", "retinanet", "fcos", "paa", "gfl")),
}


@pytest.mark.parametrize(("box", "without"), UNFIT.values(), ids=list(UNFIT))
def test_an_object_that_fits_no_anchor_leaves_heads_without_positives(box: list[float], without: list[str]) -> None:
    positives, report = one_step(tiny_images(SIZES), [make_target([box], [1]), make_target()])
    # The second stage of Faster R-CNN learns from the object itself, which is one of its regions.
    assert {name for name, count in positives.items() if count == 0} == set(without)
    assert positives["faster_rcnn"] == 1
    for name in ("faster_rcnn", *without):
        assert all(report.terms[f"{loss}_{name}"] == 0 for loss in BOX_LOSSES[name]), name
        assert report.terms["loss_rpn_cls_faster_rcnn" if name == "faster_rcnn" else f"loss_cls_{name}"] > 0


@pytest.mark.parametrize(
    "sizes", [((97, 61),), ((131, 33), (33, 131)), ((65, 129), (64, 127))], ids=["alone", "narrow", "by one"]
)
def test_sides_that_no_stride_divides_are_no_obstacle(sizes: tuple[tuple[int, int], ...]) -> None:
    targets = [make_target([[0.5, 0.5, 0.9, 0.8]], [0]) for _ in sizes]
    positives, _ = one_step(tiny_images(sizes), targets)
    assert all(positives.values()), positives


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_mixed_precision_step_of_all_heads_is_finite_and_near_the_full_one(count: int) -> None:
    torch.manual_seed(1)
    _, half = one_step(tiny_images(SIZES), [crowd(count), make_target()], amp="bf16")
    torch.manual_seed(1)
    _, full = one_step(tiny_images(SIZES), [crowd(count), make_target()])
    for name in ("loss_cls_atss", "loss_cls_retinanet", "loss_cls_fcos", "loss_cls_gfl", "loss_rpn_cls_faster_rcnn"):
        assert half.terms[name].item() == pytest.approx(full.terms[name].item(), rel=0.02), name
