"""Anchors, deltas, IoU and assignment by maximal IoU: by hand, against loops, and without asking the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou_loss

from models.aux_heads.anchors import (
    AnchorGrid,
    DeltaCoder,
    assign_max_iou,
    giou_loss,
    paired_iou,
    pairwise_iou,
)

SQUARES = AnchorGrid((8, 16), scales=(1,), ratios=(1,))


def random_boxes(*shape: int, size: float = 100.0) -> Tensor:
    corner, extent = size * torch.rand(*shape, 2), size * (0.01 + torch.rand(*shape, 2))
    return torch.cat([corner, corner + extent], -1)


# Anchors


def test_an_anchor_is_centred_on_the_corner_of_its_cell() -> None:
    # Level of stride 8, 1 x 2 cells; level of stride 16, 2 x 1 cells.
    found = SQUARES.anchors([(1, 2), (2, 1)], "cpu")
    assert found.tolist() == [[-4, -4, 4, 4], [4, -4, 12, 4], [-8, -8, 8, 8], [-8, 8, 8, 24]]


def test_the_ratio_is_height_by_width_and_keeps_the_area() -> None:
    found = AnchorGrid((8,), scales=(1,), ratios=(4, 0.25)).anchors([(1, 1)], "cpu")
    assert found.tolist() == [[-2, -8, 2, 8], [-8, -2, 8, 2]]


def test_within_a_cell_scales_change_faster_than_ratios() -> None:
    grid = AnchorGrid((8,), scales=(1, 2), ratios=(4, 1))
    widths = [(right - left) for left, _, right, _ in grid.anchors([(1, 2)], "cpu").tolist()]
    assert widths == [4, 8, 8, 16] * 2
    assert grid.per_cell == 4 and grid.level_counts([(1, 2)]) == [8]


def test_base_sizes_replace_the_strides_in_the_size_of_anchors_only() -> None:
    found = AnchorGrid((8,), scales=(1,), ratios=(1,), base_sizes=(20,)).anchors([(1, 2)], "cpu")
    assert found.tolist() == [[-10, -10, 10, 10], [-2, -10, 18, 10]]


def test_a_cell_that_an_image_only_touches_is_usable() -> None:
    # Image 0 has 9 x 17 pixels: rows 0, 1 and columns 0, 1, 2 of stride 8, cells 0 and (0, 1) of stride 16.
    found = SQUARES.usable([(3, 4), (2, 2)], [(9, 17), (24, 32)], "cpu")
    first = [True, True, True, False] * 2 + [False] * 4 + [True, True, False, False]
    assert found.tolist() == [first, [True] * 16]


def test_all_anchors_of_a_cell_are_usable_together_and_know_their_cell() -> None:
    grid = AnchorGrid((8, 16), scales=(1, 2), ratios=(1,))
    shapes = [(1, 2), (1, 1)]
    assert grid.usable(shapes, [(8, 8)], "cpu").tolist() == [[True, True, False, False, True, True]]
    assert grid.cell_of(shapes, "cpu").tolist() == [0, 0, 1, 1, 2, 2]


def test_anchors_made_while_testing_can_be_used_in_training() -> None:
    shapes = [(5, 7), (3, 4)]  # of no other test: the first call fills the cache
    with torch.inference_mode():
        SQUARES.anchors(shapes, "cpu")
    weight = torch.ones(4, requires_grad=True)
    (SQUARES.anchors(shapes, "cpu") * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": (), "ratios": (1,)}, "scales"),
        ({"scales": (1,), "ratios": (0,)}, "ratios"),
        ({"scales": (1,), "ratios": (1,), "base_sizes": (4,)}, "2 strides, but 1 base sizes"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorGrid((8, 16), **settings)


def test_a_pyramid_with_other_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strides \(8, 16\), but there are 1 maps"):
        SQUARES.anchors([(4, 4)], "cpu")


# Deltas


def test_deltas_by_hand() -> None:
    # Anchor: centre (10, 20), 20 x 40. Box: centre (14, 16), 40 x 10.
    anchor, box = torch.tensor([0.0, 0, 20, 40]), torch.tensor([-6.0, 11, 34, 21])
    expected = [0.2, -0.1, math.log(2), -math.log(4)]
    assert DeltaCoder().encode(anchor, box).tolist() == pytest.approx(expected)
    scaled = DeltaCoder((0.1, 0.1, 0.2, 0.2))
    assert scaled.encode(anchor, box).tolist() == pytest.approx([2, -1, 5 * math.log(2), -5 * math.log(4)])
    assert scaled.decode(anchor, scaled.encode(anchor, box)).tolist() == pytest.approx(box.tolist(), abs=1e-4)


def test_decoding_changes_a_side_at_most_62_5_times() -> None:
    anchor, coder = torch.tensor([-5.0, -5, 5, 5]), DeltaCoder((1, 1, 0.5, 0.5))
    found = coder.decode(anchor, torch.tensor([0.0, 0, 1e4, -1e4]))
    assert found.tolist() == pytest.approx([-312.5, -0.08, 312.5, 0.08])


def test_decoded_boxes_are_cut_to_the_size_of_their_image() -> None:
    anchors = torch.tensor([[-5.0, -6, 100, 200]])
    found = DeltaCoder().decode(anchors, torch.zeros(2, 1, 4), clip=torch.tensor([[30, 40], [50, 60]]))
    assert found.tolist() == [[[0, 0, 40, 30]], [[0, 0, 60, 50]]]
    alone = DeltaCoder().decode(anchors, torch.zeros(1, 4), clip=torch.tensor([30, 40]))
    assert alone.tolist() == [[0, 0, 40, 30]]


def test_deltas_of_half_precision_are_decoded_in_float32() -> None:
    anchor, coder = torch.tensor([1000.0, 1000, 1100, 1100]), DeltaCoder((0.1, 0.1, 0.2, 0.2))
    deltas = torch.tensor([0.3, -0.3, 1.0, -1.0], dtype=torch.bfloat16)
    found = coder.decode(anchor, deltas)
    assert found.dtype == torch.float32 and torch.equal(found, coder.decode(anchor, deltas.float()))


def test_deltas_of_the_padding_of_a_batch_are_finite() -> None:
    zero, anchor = torch.zeros(4), torch.tensor([0.0, 0, 20, 40])
    assert DeltaCoder().encode(anchor, zero).isfinite().all()
    assert DeltaCoder().encode(zero, zero).isfinite().all()


# Overlap


def test_iou_by_hand() -> None:
    # 10 x 10 squares: the same, half beside, apart; and an empty box.
    a = torch.tensor([[[0.0, 0, 10, 10]]])
    b = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 0, 30, 10], [3, 3, 3, 3]]])
    assert pairwise_iou(a, b).flatten().tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert paired_iou(a, b).flatten().tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert paired_iou(b[0, 3], b[0, 3]).item() == 0


def test_pairs_stay_within_their_image() -> None:
    a, b = random_boxes(2, 7), random_boxes(2, 5)
    found = pairwise_iou(a, b)
    for image in range(2):
        torch.testing.assert_close(found[image], box_iou(a[image], b[image]))
    torch.testing.assert_close(pairwise_iou(a[:1], b)[1], box_iou(a[0], b[1]))


def test_giou_loss_by_hand() -> None:
    # Two unit squares with a unit gap: IoU 0, hull 3, union 2, so GIoU = -1 / 3.
    a, b = torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 0, 3, 1])
    assert giou_loss(a, b).item() == pytest.approx(4 / 3)
    assert giou_loss(a, a).item() == pytest.approx(0, abs=1e-6)


def test_giou_loss_and_its_gradient_are_those_of_torchvision() -> None:
    ours, target = random_boxes(50).requires_grad_(), random_boxes(50)
    theirs = ours.detach().clone().requires_grad_()
    giou_loss(ours, target).sum().backward()
    expected = generalized_box_iou_loss(theirs, target)
    expected.sum().backward()
    torch.testing.assert_close(giou_loss(ours, target), expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_giou_loss_of_empty_boxes_is_finite_with_a_finite_gradient() -> None:
    boxes = torch.zeros(4, requires_grad=True)
    loss = giou_loss(boxes, torch.zeros(4))
    loss.backward()
    assert loss.isfinite() and boxes.grad.isfinite().all()


# Assignment by maximal IoU


def assign(iou: list[list[float]], low_quality: bool = False, **changes) -> tuple[list, list, list]:
    """Assign in one image; `iou` has a row for each box."""
    iou = torch.tensor([iou])
    valid, usable = torch.ones(1, iou.shape[2], dtype=torch.bool), torch.ones(1, iou.shape[1], dtype=torch.bool)
    settings = {"positive": 0.5, "negative": 0.25, "min_positive": 0.25, "low_quality": low_quality}
    inputs = {"valid": valid, "usable": usable, **settings, **changes}
    target, positive, negative = assign_max_iou(iou, **inputs)
    return target[0].tolist(), positive[0].tolist(), negative[0].tolist()


def test_the_positive_threshold_is_included_and_the_negative_one_is_not() -> None:
    target, positive, negative = assign([[0.125, 0.5], [0.25, 0.0], [0.125, 0.0]])
    assert target == [1, 0, 0]
    assert positive == [True, False, False]
    assert negative == [False, False, True]  # box 1 is ignored


def test_an_object_takes_all_boxes_that_tie_at_its_best_iou() -> None:
    target, positive, negative = assign([[0.0, 0.375], [0.0, 0.375], [0.0, 0.3125]], low_quality=True)
    assert target == [1, 1, 0] and positive == [True, True, False] and negative == [False, False, False]


def test_an_object_takes_its_best_box_from_an_object_that_overlaps_it_more() -> None:
    target, positive, _ = assign([[0.75, 0.375], [0.875, 0.0]], low_quality=True)
    assert target == [1, 0] and positive == [True, True]


def test_the_later_of_two_objects_keeps_the_box_that_both_want() -> None:
    assert assign([[0.375, 0.3125]], low_quality=True)[0] == [1]
    assert assign([[0.3125, 0.375]], low_quality=True)[0] == [1]


def test_an_object_below_the_minimum_takes_nothing() -> None:
    assert assign([[0.2], [0.0]], low_quality=True) == ([0, 0], [False, False], [True, True])
    taken = assign([[0.2], [0.0]], low_quality=True, min_positive=0.0)
    assert taken == ([0, 0], [True, False], [False, True])


def test_padded_objects_and_unusable_boxes_take_no_part() -> None:
    iou = [[0.75, 0.875], [0.25, 0.875], [0.875, 0.0]]
    valid, usable = torch.tensor([[True, False]]), torch.tensor([[True, True, False]])
    found = assign(iou, low_quality=True, min_positive=0.0, negative=0.3, valid=valid, usable=usable)
    assert found == ([0, 0, 0], [True, False, False], [False, True, False])


def test_without_objects_every_usable_box_is_negative() -> None:
    valid = torch.zeros(1, 1, dtype=torch.bool)
    found = assign([[0.0], [0.0]], low_quality=True, min_positive=0.0, valid=valid)
    assert found == ([0, 0], [False, False], [True, True])


def loop_assignment(iou: Tensor, low_quality: bool) -> list[int]:
    """Return the object of each box of an image, -1 background, -2 ignored: by the definition, a loop over objects."""
    result = []
    for row in iou:
        best = row.max().item()
        result.append(row.argmax().item() if best >= 0.5 else -1 if best < 0.25 else -2)
    for number in range(iou.shape[1] if low_quality else 0):
        best = iou[:, number].max()
        for box in range(len(iou)):
            if best >= 0.25 and iou[box, number] == best:
                result[box] = number
    return result


@pytest.mark.parametrize("low_quality", [False, True])
def test_batches_with_many_ties_are_assigned_as_a_loop_would(low_quality: bool) -> None:
    iou = (8 * torch.rand(6, 30, 5)).floor() / 8  # eighths are exact
    counts = torch.tensor([0, 1, 2, 3, 4, 5])
    valid = torch.arange(5) < counts[:, None]
    usable = torch.rand(6, 30) < 0.8
    target, positive, negative = assign_max_iou(
        iou, valid, usable, positive=0.5, negative=0.25, min_positive=0.25, low_quality=low_quality
    )
    assert not (positive & negative).any() and not ((positive | negative) & ~usable).any()
    for image, count in enumerate(counts[1:].tolist(), start=1):
        here = usable[image]
        found = torch.where(positive[image], target[image], torch.where(negative[image], -1, -2))[here]
        assert found.tolist() == loop_assignment(iou[image, here, :count], low_quality)


def test_nothing_waits_for_the_device() -> None:
    """Tensors without data cannot be asked for a number: whatever needs one fails."""
    shapes, boxes = [(4, 4), (2, 2)], torch.empty(2, 3, 4, device="meta")
    anchors, usable = SQUARES.anchors(shapes, "meta"), SQUARES.usable(shapes, [(9, 9), (32, 32)], "meta")
    coder = DeltaCoder((0.1, 0.1, 0.2, 0.2))
    decoded = coder.decode(anchors, torch.empty(2, 20, 4, device="meta"), clip=torch.empty(2, 2, device="meta"))
    assert coder.encode(decoded, anchors).shape == (*giou_loss(decoded, anchors).shape, 4) == (2, 20, 4)
    found = assign_max_iou(
        pairwise_iou(anchors[None], boxes),
        torch.empty(2, 3, dtype=torch.bool, device="meta"),
        usable,
        positive=0.5,
        negative=0.4,
        min_positive=0.0,
        low_quality=True,
    )
    assert [tuple(part.shape) for part in found] == [(2, 20)] * 3
