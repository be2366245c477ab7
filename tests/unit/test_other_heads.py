"""RetinaNet, FCOS, PAA and GFL as auxiliary heads: assignment and losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from models.aux_heads.base import AuxHead, Objects
from models.aux_heads.fcos import FCOSHead, assign_points, centerness_of
from models.aux_heads.gfl import GFLHead, distribution_focal_loss, quality_focal_loss
from models.aux_heads.paa import PAAHead, cheap_part, split_candidates
from models.aux_heads.retinanet import RetinaNetHead
from tests.unit.small_pyramid import CELLS, build, some_objects, some_pyramid

# Focal loss of a class logit at the prior .01, where the target is 1 and where it is 0.
POSITIVE, NEGATIVE = 0.25 * 0.99**2 * -math.log(0.01), 0.75 * 0.01**2 * -math.log(0.99)


def at_the_prior(head: AuxHead) -> AuxHead:
    """Make every class probability .01 and every other output 0."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    return head


# RetinaNet


def test_retinanet_losses_of_a_hand_computed_image() -> None:
    # Anchors of 32 x 32 around (8 column, 8 row); the object is one of them, moved by 4 pixels to the right. Shifts
    # (4, 0) have IoU .78 and are positive, (12, 0) and (4, 8) have .45 and .49 and are ignored, others are negative.
    head = at_the_prior(build(RetinaNetHead, (8,), scales=(4.0,), ratios=(1.0,)))
    output = head(some_pyramid([(32, 40)], strides=(8,), canvas=(32, 40)), some_objects([(4, 0, 36, 32)]))
    positive, negative = output.samples.positive.view(4, 5), output.samples.negative.view(4, 5)
    assert positive.nonzero().tolist() == [[2, 2], [2, 3]]
    ignored = ~(positive | negative)
    assert ignored.nonzero().tolist() == [[1, 2], [1, 3], [2, 1], [2, 4], [3, 2], [3, 3]]
    classes = (2 * POSITIVE + 2 * 2 * NEGATIVE + 12 * 3 * NEGATIVE) / 2
    assert output.losses["loss_cls"].tolist() == pytest.approx([classes])
    assert output.losses["loss_bbox"].tolist() == pytest.approx([2.0 * (1 - 28 / 36)])  # weight times 1 - GIoU


def test_retinanet_gives_every_object_its_best_anchor_however_small_it_is() -> None:
    head = build(RetinaNetHead)
    boxes = [(17.0, 17.0, 18.0, 18.0), (60.0, 40.0, 60.5, 40.5)]
    samples = head(some_pyramid([(64, 96)]), some_objects(boxes)).samples
    chosen, target = samples.boxes[samples.positive], samples.target[samples.positive]
    for number, box in enumerate(boxes):  # several anchors share the best IoU: all that contain it and are smallest
        own, (left, top, right, bottom) = chosen[target == number], box
        assert len(own) > 0
        assert ((own[:, :2] <= torch.tensor([left, top])) & (own[:, 2:] >= torch.tensor([right, bottom]))).all()


def test_an_empty_object_does_not_take_all_anchors() -> None:
    for head in (RetinaNetHead, PAAHead):
        samples = build(head)(some_pyramid([(64, 96)]), some_objects([(30, 30, 30, 30)])).samples
        assert not samples.positive.any()


def test_the_nine_anchors_of_a_cell_share_its_feature() -> None:
    pyramid = some_pyramid([(64, 96)])
    samples = build(RetinaNetHead)(pyramid, some_objects([(8, 8, 60, 60)])).samples
    assert samples.boxes.shape == (1, 9 * CELLS, 4)
    assert samples.feature_of.tolist() == [cell for cell in range(CELLS) for _ in range(9)]
    assert torch.equal(samples.features[0, 8 * 12 + 7], pyramid.maps[1][0, :, 1, 1])


# FCOS


def test_centerness_of_a_hand_computed_point() -> None:
    # One from the left of 4, two from the top of 5: sqrt(1/3 * 2/3).
    assert centerness_of(torch.tensor([1.0, 2, 3, 3])).item() == pytest.approx(math.sqrt(1 / 3 * 2 / 3))
    assert centerness_of(torch.tensor([2.0, 2, 2, 2])).item() == 1
    assert centerness_of(torch.tensor([-1.0, 2, 5, 2])).item() == 0


def assigned(points: list[tuple[float, float]], stride: int, objects: Objects) -> list[int]:
    """Return the object of each point of the level with `stride`, -1 for none."""
    target, positive = assign_points(
        torch.tensor(points), torch.full((len(points),), float(stride)), objects, levels=(8, 16, 32), radius=1.5
    )
    return torch.where(positive, target, -1)[0].tolist()


def test_a_point_is_positive_in_the_centre_region_only() -> None:
    # The region of the first object, at stride 8, is (28, 28)..(52, 52); borders are outside.
    wide = some_objects([(0, 0, 80, 80)])
    assert assigned([(28.1, 40), (28, 40), (51.9, 51.9), (40, 52), (5, 5)], 8, wide) == [0, -1, 0, -1, -1]
    # A small object cuts the region off: its own border counts.
    assert assigned([(41, 40), (47, 40)], 8, some_objects([(36, 36, 44, 44)])) == [0, -1]


def test_a_level_takes_objects_of_its_size() -> None:
    # The farthest side decides: up to 64 is level 8, 64 to 128 level 16, from 128 level 32; borders belong to both.
    for half, levels in ((63.0, {8}), (64.0, {8, 16}), (65.0, {16}), (128.0, {16, 32}), (300.0, {32})):
        box = some_objects([(400 - half, 400 - half, 400 + half, 400 + half)])
        assert {s for s in (8, 16, 32) if assigned([(400.0, 400.0)], s, box) == [0]} == levels


def test_a_point_of_two_objects_goes_to_the_smaller_one() -> None:
    objects = some_objects([(0, 0, 60, 60), (20, 20, 40, 40), (10, 10, 50, 50)])
    assert assigned([(30.0, 30.0), (38.0, 30.0), (41.0, 30.0)], 8, objects) == [1, 1, 2]


def test_fcos_losses_of_a_hand_computed_image() -> None:
    # Points (4 + 8 column, 4 + 8 row). The region of the object is (4, 4)..(28, 28) and holds the four points
    # around its centre; the others are on its border. All sides are predicted 0: boxes are empty and inside the object,
    # so IoU is 0 and the hull is the union.
    head = at_the_prior(build(FCOSHead, (8,)))
    output = head(some_pyramid([(32, 32)], strides=(8,), canvas=(32, 32)), some_objects([(0, 0, 32, 32)]))
    assert output.samples.positive.view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    losses = {name: value.item() for name, value in output.losses.items()}
    assert losses["loss_cls"] == pytest.approx((4 * (POSITIVE + 2 * NEGATIVE) + 12 * 3 * NEGATIVE) / 4)
    assert losses["loss_bbox"] == pytest.approx(1.0)
    assert losses["loss_centerness"] == pytest.approx(math.log(2))  # at probability 1/2, whatever the target


def test_the_query_of_a_point_is_a_square_of_eight_strides_around_it() -> None:
    samples = build(FCOSHead)(some_pyramid([(64, 96)]), some_objects([(0, 0, 32, 32)])).samples
    assert samples.boxes[0, 13].tolist() == [12 - 32, 12 - 32, 12 + 32, 12 + 32]
    assert samples.boxes[0, 8 * 12].tolist() == [8 - 64, 8 - 64, 8 + 64, 8 + 64]


def test_padding_is_background_for_the_losses_of_fcos_but_no_query() -> None:
    head, objects = at_the_prior(build(FCOSHead)), some_objects([])
    output = head(some_pyramid([(32, 40)]), objects)
    assert output.losses["loss_cls"].item() == pytest.approx(CELLS * 3 * NEGATIVE, rel=1e-4)
    assert output.samples.negative.sum() == 4 * 5 + 2 * 3 + 1 * 2


# PAA


def test_the_cheap_part_ends_where_the_mixture_is_densest() -> None:
    # Two clear clusters: of the cheap one the middle is the densest point.
    costs = torch.tensor([[0.10, 0.12, 0.14, 3.00, 3.02]])
    assert cheap_part(costs, costs < torch.inf).tolist() == [[True, True, False, False, False]]


def test_fewer_than_two_candidates_give_no_positive() -> None:
    costs = torch.tensor([[0.5, torch.inf], [torch.inf, torch.inf], [0.5, 0.5]])
    assert cheap_part(costs, costs < torch.inf).tolist() == [[False, False], [False, False], [True, False]]


def slow_cheap_part(costs: list[float]) -> int:
    """Return how many of the ascending `costs` are kept, by expectation maximisation written out for one object."""
    means, variances, shares, before = [costs[0], costs[-1]], [1.0, 1.0], [0.5, 0.5], -math.inf

    def density(x: float, k: int) -> float:
        return shares[k] * math.exp(-((x - means[k]) ** 2) / (2 * variances[k])) / math.sqrt(2 * math.pi * variances[k])

    for _ in range(100):
        mixture = [density(x, 0) + density(x, 1) for x in costs]
        member = [[density(x, k) / m for x, m in zip(costs, mixture)] for k in (0, 1)]
        likelihood = sum(map(math.log, mixture)) / len(costs)
        for k in (0, 1):
            mass = sum(member[k]) + 1e-14
            means[k] = sum(r * x for r, x in zip(member[k], costs)) / mass
            variances[k] = sum(r * (x - means[k]) ** 2 for r, x in zip(member[k], costs)) / mass + 1e-6
            shares[k] = mass / len(costs)
        if abs(likelihood - before) < 1e-3:
            break
        before = likelihood
    cheap = [i for i, x in enumerate(costs) if density(x, 0) >= density(x, 1)]
    if not cheap:
        return 0
    densest = max(cheap, key=lambda i: density(costs[i], 0) + density(costs[i], 1))
    return sum(i <= densest for i in cheap)


def test_objects_fitted_together_get_what_each_gets_alone() -> None:
    # Of different number and spread, so that they stop after different numbers of rounds.
    numbers = torch.randint(2, 20, (40,))
    costs = torch.rand(40, 20) * torch.rand(40, 1) * 4 + (torch.rand(40, 20) > 0.5) * torch.rand(40, 1)
    costs = torch.where(torch.arange(20) < numbers[:, None], costs, torch.inf).sort(1)[0].double()
    kept = cheap_part(costs, costs < torch.inf).sum(1).tolist()
    assert kept == [slow_cheap_part(row[:n].tolist()) for row, n in zip(costs, numbers.tolist())]
    assert len(set(kept)) > 3


def test_candidates_are_the_cheapest_of_each_level_and_of_their_own_object() -> None:
    # Two levels, of 4 and 3 anchors, two candidates each. Object 0: costs .1, .12 | .11, .9; object 1: 2, 2.1.
    cost = torch.tensor([[0.1, 2.0, 0.12, 0.5, 0.9, 2.1, 0.11]])
    target = torch.tensor([[0, 1, 0, 0, 0, 1, 0]])
    everything = torch.ones_like(target, dtype=torch.bool)
    found = split_candidates(cost, target, everything, [4, 3], objects=2, topk=2)
    first, second = slow_cheap_part([0.1, 0.11, 0.12, 0.9]), slow_cheap_part([2.0, 2.1])
    order = {0: [0, 6, 2, 4], 1: [1, 5]}
    want = sorted(order[0][:first] + order[1][:second])
    assert found[0].nonzero()[:, 0].tolist() == want
    assert not split_candidates(cost, target, ~everything, [4, 3], objects=2, topk=2).any()


def test_paa_losses_of_a_hand_computed_image() -> None:
    # All outputs are at the prior, so boxes are anchors; one level of 64 x 64 anchors, the object is one of them. Costs
    # differ by GIoU alone: 0 for that anchor; nothing but it and the anchors next to it can be in the cheap part.
    head = at_the_prior(build(PAAHead, (8,)))
    output = head(some_pyramid([(64, 64)], strides=(8,), canvas=(64, 64)), some_objects([(0, 0, 64, 64)]))
    positive = output.samples.positive.view(8, 8)
    assert positive[4, 4]
    rows, columns = positive.nonzero().unbind(1)
    shifts = list(zip((8 * (columns - 4).abs()).tolist(), (8 * (rows - 4).abs()).tolist()))
    overlaps = [(64 - x) * (64 - y) for x, y in shifts]
    ious = [overlap / (2 * 64 * 64 - overlap) for overlap in overlaps]
    hulls = [(64 + x) * (64 + y) for x, y in shifts]
    gious = [iou - 1 + (2 * 64 * 64 - overlap) / hull for iou, overlap, hull in zip(ious, overlaps, hulls)]
    count = len(shifts)
    losses = {name: value.item() for name, value in output.losses.items()}
    assert losses["loss_cls"] == pytest.approx(
        (count * (POSITIVE + 2 * NEGATIVE) + (64 - count) * 3 * NEGATIVE) / count
    )
    assert losses["loss_bbox"] == pytest.approx(
        1.3 * sum(i * (1 - g) for i, g in zip(ious, gious)) / sum(ious), abs=1e-6
    )
    assert losses["loss_iou"] == pytest.approx(0.5 * math.log(2))


def test_without_positives_the_class_loss_of_paa_is_divided_by_the_images() -> None:
    output = at_the_prior(build(PAAHead))(some_pyramid([(64, 96)] * 3), some_objects([], [], []))
    assert output.losses["loss_cls"].item() == pytest.approx(CELLS * 3 * NEGATIVE, rel=1e-4)
    assert output.losses["loss_bbox"] == output.losses["loss_iou"] == 0


# GFL


def test_quality_focal_loss_by_hand() -> None:
    # Probability .5 and target .8: the cross entropy is ln 2, the factor .3^2; a negative: ln 2 * .25.
    found = quality_focal_loss(torch.zeros(2), torch.tensor([0.8, 0.0]))
    assert found.tolist() == pytest.approx([math.log(2) * 0.09, math.log(2) * 0.25])


def test_distribution_focal_loss_by_hand() -> None:
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = distribution_focal_loss(shares.log().expand(4, 4), torch.tensor([1.25, 2.0, -3.0, 50.0]))
    want = [
        -0.75 * math.log(0.2) - 0.25 * math.log(0.3),
        -math.log(0.3),
        -math.log(0.1),
        -0.1 * math.log(0.3) - 0.9 * math.log(0.4),  # cut to 2.9
    ]
    assert found.tolist() == pytest.approx(want)


def test_gfl_losses_of_a_hand_computed_image() -> None:
    # Uniform distributions: every side is 8 strides = 64 pixels away, so boxes are 128 x 128 around the corner of a
    # cell, and the object, 128 x 128 around (64, 64), has IoU 1 with the box of cell (8, 8).
    head = at_the_prior(build(GFLHead, (8,)))
    output = head(some_pyramid([(128, 128)], strides=(8,), canvas=(128, 128)), some_objects([(0, 0, 128, 128)]))
    rows, columns = output.samples.positive.view(16, 16).nonzero().unbind(1)
    shifts = list(zip((8 * (columns - 8).abs()).tolist(), (8 * (rows - 8).abs()).tolist()))
    assert (0, 0) in shifts
    overlaps = [(128 - x) * (128 - y) for x, y in shifts]
    unions = [2 * 128 * 128 - overlap for overlap in overlaps]
    ious = [overlap / union for overlap, union in zip(overlaps, unions)]
    hulls = [(128 + x) * (128 + y) for x, y in shifts]
    gious = [iou - 1 + union / hull for iou, union, hull in zip(ious, unions, hulls)]
    background = 0.01**2 * -math.log(0.99)
    quality = [(i * -math.log(0.01) - (1 - i) * math.log(0.99)) * (i - 0.01) ** 2 for i in ious]
    count = len(shifts)
    want = (sum(quality) + (256 * 3 - count) * background) / count
    assert output.losses["loss_cls"].item() == pytest.approx(want, rel=1e-5)
    # The best class score of every positive is .01; their sum is below 1, the least divisor.
    want = 2.0 * 0.01 * sum(1 - g for g in gious)
    assert output.losses["loss_bbox"].item() == pytest.approx(want, rel=1e-5)
    assert output.losses["loss_dfl"].item() == pytest.approx(0.25 * 0.01 * count * math.log(17), rel=1e-5)
