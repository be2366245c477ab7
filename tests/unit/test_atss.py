"""The ATSS head: assignment and losses by hand, against loops, and in batches of uneven images."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from models.aux_heads import atss
from models.aux_heads.atss import ATSSHead, assign_atss, centerness_targets
from models.aux_heads.base import AuxOutput, Objects, Pyramid

WIDTH, CLASSES = 32, 3


def make_objects(*images: list[list[float]]) -> Objects:
    """Return the objects of each image, given by their boxes; the labels count up from 0."""
    counts = [len(boxes) for boxes in images]
    most = max([1, *counts])
    labels, boxes = torch.zeros(len(images), most, dtype=torch.int64), torch.zeros(len(images), most, 4)
    for i, count in enumerate(counts):
        labels[i, :count] = torch.arange(count) % CLASSES
        boxes[i, :count] = torch.tensor(images[i]).view(-1, 4)
    return Objects(labels, boxes, torch.arange(most) < torch.tensor(counts)[:, None], counts)


def make_pyramid(sizes: list[tuple[int, int]], strides: tuple[int, ...] = (8, 16), canvas: int = 64) -> Pyramid:
    maps = [torch.randn(len(sizes), WIDTH, canvas // s, canvas // s, requires_grad=True) for s in strides]
    return Pyramid(maps, strides, sizes, sizes, (canvas, canvas))


def assign(
    anchors: list[list[float]], boxes: list[list[float]], counts: list[int] | None = None, **changes
) -> tuple[list[int], list[bool]]:
    """Assign in one image."""
    usable = changes.pop("usable", [True] * len(anchors))
    target, positive = assign_atss(
        torch.tensor(anchors), counts or [len(anchors)], make_objects(boxes), torch.tensor([usable]), **changes
    )
    return target[0].tolist(), positive[0].tolist()


def silent_head(strides: tuple[int, ...] = (8,), **settings: float) -> ATSSHead:
    """Return a head that says 0 to everything: probability 1/2, and the anchor as box."""
    head = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=strides, **settings)
    for layer in (head.atss_cls, head.atss_reg, head.atss_centerness):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return head


# Assignment

OBJECT = [0.0, 0.0, 10.0, 10.0]
HIT, NEAR, MISS = [0.0, 0, 10, 10], [0.0, 0, 10, 8], [40.0, 0, 50, 10]


def test_the_threshold_is_the_mean_plus_the_standard_deviation() -> None:
    # IoUs 1, 0.8, 0, 0, 0, 0: mean 0.3, deviations 0.7, 0.5, -0.3 four times: sqrt(1.1 / 5) = 0.469; 0.769 in all.
    target, positive = assign([HIT, NEAR, *[MISS] * 4], [OBJECT])
    assert target == [0] * 6 and positive == [True, True, False, False, False, False]
    # One miss less: mean 0.36, sqrt((0.64^2 + 0.44^2 + 3 * 0.36^2) / 4) = 0.498; 0.858 in all.
    assert assign([HIT, NEAR, *[MISS] * 3], [OBJECT])[1] == [True, False, False, False, False]


def test_the_standard_deviation_is_the_unbiased_one() -> None:
    # IoUs 1, 1, 0, 0: 0.5 + sqrt(1 / 3) is more than 1, 0.5 + sqrt(1 / 4) would not be.
    assert assign([HIT, HIT, MISS, MISS], [OBJECT])[1] == [False] * 4


def test_a_single_candidate_is_its_own_threshold() -> None:
    assert assign([NEAR], [OBJECT])[1] == [True]


@pytest.mark.parametrize(("centre", "expected"), [(10.0, False), (9.995, False), (9.98, True), (10.5, False)])
def test_the_centre_of_a_positive_is_inside_the_object(centre: float, expected: bool) -> None:
    assert assign([[centre - 5, 0, centre + 5, 10], *[MISS] * 3], [OBJECT])[1] == [expected, False, False, False]


def test_only_the_nearest_anchors_of_each_level_are_candidates() -> None:
    # The second anchor of each level is farther away, so its IoU does not lower the threshold.
    anchors, boxes = [HIT, MISS, NEAR, MISS], [OBJECT]
    assert assign(anchors, boxes, [2, 2], topk=1)[1] == [False] * 4  # 0.9 + 0.141 of IoUs 1 and 0.8
    assert assign(anchors, boxes, [4], topk=1)[1] == [True, False, False, False]
    assert assign(anchors, boxes, [4], topk=4)[1] == [True, False, False, False]  # 0.45 + 0.526 of all four


def test_an_unusable_anchor_is_no_candidate() -> None:
    usable = [False, True, False, False]
    assert assign([HIT, NEAR, MISS, MISS], [OBJECT], usable=usable)[1] == [False, True, False, False]


def test_an_anchor_that_two_objects_want_goes_to_the_higher_iou() -> None:
    anchor = [[0.0, 0.0, 10.0, 9.0]]  # IoU 0.9 with the first, 8 / 9 with the second
    first, second = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]
    assert assign(anchor, [first, second]) == ([0], [True])
    assert assign(anchor, [second, first]) == ([1], [True])
    assert assign(anchor, [first, first]) == ([0], [True])


def loop_assignment(anchors: Tensor, counts: list[int], boxes: Tensor, topk: int) -> list[int]:
    """Return the object of each anchor of an image, -1 background: algorithm 1 of ATSS, object by object."""
    result, won = [-1] * len(anchors), [-1.0] * len(anchors)
    for number, box in enumerate(boxes):
        iou = box_iou(anchors, box[None])[:, 0]
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        away = (centres - (box[:2] + box[2:]) / 2).square().sum(-1).sqrt()
        candidates, first = [], 0
        for count in counts:
            nearest = sorted(range(first, first + count), key=lambda i: away[i].item())
            candidates += nearest[:topk]
            first += count
        threshold = iou[candidates].mean() + iou[candidates].std()
        for i in candidates:
            (x, y), inside = centres[i].tolist(), box.tolist()
            margin = min(x - inside[0], y - inside[1], inside[2] - x, inside[3] - y)
            if iou[i] >= threshold and margin > 0.01 and iou[i] > won[i]:
                result[i], won[i] = number, iou[i].item()
    return result


def test_batches_are_assigned_as_a_loop_would() -> None:
    shape = (6, 120)
    corner = 100 * torch.rand(120, 2)
    anchors = torch.cat([corner, corner + 15 + 30 * torch.rand(120, 2)], -1)
    counts, numbers = [80, 30, 7, 3], [0, 1, 2, 5, 9, 12]
    images = []
    for number in numbers:
        corner = 80 * torch.rand(number, 2)
        images.append(torch.cat([corner, corner + 5 + 50 * torch.rand(number, 2)], -1).tolist())
    objects = make_objects(*images)
    usable = torch.rand(shape) < 0.7
    target, positive = assign_atss(anchors, counts, objects, usable, topk=9)
    assert not (positive & ~usable).any()
    assert positive.sum() > 30
    for image, number in enumerate(numbers):
        here = usable[image]
        left = [int(part.sum()) for part in here.split(counts)]
        expected = loop_assignment(anchors[here], left, objects.boxes[image, :number], 9)
        assert torch.where(positive[image], target[image], -1)[here].tolist() == expected


def test_centerness_by_hand() -> None:
    # Centre (16, 16) in (8, 8, 28, 24): 8 to the left, 12 to the right, 8 up and down.
    anchors, boxes = torch.tensor([[0.0, 0, 32, 32]] * 2), torch.tensor([[[8.0, 8, 28, 24]] * 2])
    found = centerness_targets(anchors, boxes, torch.tensor([[True, False]]))
    assert found[0].tolist() == pytest.approx([math.sqrt(8 / 12), 0])


# Losses and samples


def losses_of_one_positive(**weights: float) -> AuxOutput:
    """One object, whose only candidate is the anchor at (16, 16), and an empty image of half the height.

    Stride 8 on 4 x 4 cells: 16 and 8 of them are usable.
    """
    pyramid = make_pyramid([(32, 32), (16, 32)], (8,), 32)
    return silent_head(topk=1, **weights)(pyramid, make_objects([[8.0, 8.0, 28.0, 24.0]], []))


def test_losses_by_hand() -> None:
    # The empty image counts as one positive. Anchor 64 x 64 around an object of 20 x 16: GIoU = IoU = 320 / 4096.
    losses = losses_of_one_positive().losses
    log2, centerness = math.log(2), math.sqrt(8 / 12)
    negatives = 24 * CLASSES - 1
    assert losses["loss_cls"].tolist() == pytest.approx([(0.25 + 0.75 * negatives) * 0.25 * log2 / 2])
    assert losses["loss_bbox"].tolist() == pytest.approx([2 * centerness * (1 - 320 / 4096)])  # the divisor is 1
    assert losses["loss_centerness"].tolist() == pytest.approx([log2 / 2])


def test_the_weights_multiply_their_losses() -> None:
    before = losses_of_one_positive().losses
    after = losses_of_one_positive(class_weight=3.0, box_weight=10.0, centerness_weight=7.0).losses
    for name, factor in (("loss_cls", 3), ("loss_bbox", 5), ("loss_centerness", 7)):
        assert after[name].item() == pytest.approx(factor * before[name].item())


def test_divisors_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = losses_of_one_positive().losses
    monkeypatch.setattr(atss, "average_over_processes", lambda count: 4 * count)  # the others have many more
    after = losses_of_one_positive().losses
    assert after["loss_cls"].item() == pytest.approx(before["loss_cls"].item() / 4)
    assert after["loss_centerness"].item() == pytest.approx(before["loss_centerness"].item() / 4)
    assert after["loss_bbox"].item() == pytest.approx(before["loss_bbox"].item() / (4 * math.sqrt(8 / 12)))


def test_samples_are_all_anchors_and_those_outside_are_negatives_without_extent() -> None:
    samples = losses_of_one_positive().samples
    assert samples.positive.nonzero().tolist() == [[0, 10]]  # row 2, column 2
    assert samples.boxes[0, 10].tolist() == [-16, -16, 48, 48] and samples.target[0, 10] == 0
    assert (samples.negative == ~samples.positive).all()
    assert (samples.boxes[1, 8:] == 0).all() and (samples.boxes[1, :8] == samples.boxes[0, :8]).all()


def test_features_of_the_samples_are_the_cells_and_pass_gradient_on() -> None:
    head, pyramid = silent_head((8, 16)), make_pyramid([(64, 64)])
    samples = head(pyramid, make_objects([])).samples
    assert samples.features.shape == (1, 64 + 16, WIDTH) and samples.feature_of is None
    assert torch.equal(samples.features[0, 64 + 5], pyramid.maps[1][0, :, 1, 1])
    samples.features[0, 64 + 5].sum().backward()
    assert pyramid.maps[1].grad.nonzero()[:, 2:].unique(dim=0).tolist() == [[1, 1]]
    assert not samples.boxes.requires_grad


@pytest.mark.parametrize("numbers", [(0, 0), (1, 0), (400, 1)])
def test_every_parameter_learns_whatever_the_number_of_objects(numbers: tuple[int, int]) -> None:
    head = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16, 32))
    pyramid = make_pyramid([(64, 64), (40, 56)], (8, 16, 32))
    corner = [40 * torch.rand(number, 2) for number in numbers]
    images = [torch.cat([c, c + 2 + 20 * torch.rand(len(c), 2)], -1).tolist() for c in corner]
    losses = head(pyramid, make_objects(*images)).losses
    assert all(loss.shape == (3,) and loss.isfinite().all() for loss in losses.values())
    sum(loss.sum() for loss in losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if sum(numbers) == 0:
        assert losses["loss_bbox"].sum() == 0 == losses["loss_centerness"].sum()
        assert head.atss_cls.weight.grad.abs().sum() > 0 == head.atss_reg.weight.grad.abs().sum()
    else:
        assert head.atss_reg.weight.grad.abs().sum() > 0 and head.atss_centerness.weight.grad.abs().sum() > 0


def test_cells_outside_an_image_count_in_no_loss() -> None:
    head, pyramid = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16)), make_pyramid([(64, 64), (24, 32)])
    logits, *others = head.outputs(pyramid)
    logits.retain_grad()
    head.outputs = lambda _: (logits, *others)  # the same outputs, with a gradient to look at
    head(pyramid, make_objects([], [[4.0, 4.0, 20.0, 20.0]])).losses["loss_cls"].sum().backward()
    usable = head.grid.usable(pyramid.shapes, pyramid.usable, "cpu")
    assert torch.equal(logits.grad.abs().sum(-1) > 0, usable)


def test_losses_under_autocast_are_float32_and_close() -> None:
    head, pyramid = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16)), make_pyramid([(64, 64)])
    objects = make_objects([[10.0, 12.0, 50.0, 40.0], [0.0, 0.0, 20.0, 20.0]])
    exact = head(pyramid, objects).losses
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(pyramid, objects).losses
    for name, loss in rough.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.02, atol=1e-4)


def test_training_never_waits_for_the_device() -> None:
    """Tensors without data cannot be asked for a number: whatever needs one fails."""
    head = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16)).to("meta")
    maps = [torch.empty(2, WIDTH, n, n, device="meta") for n in (8, 4)]
    objects = Objects(
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
        torch.empty(2, 3, 4, device="meta"),
        torch.empty(2, 3, dtype=torch.bool, device="meta"),
        [3, 0],
    )
    output = head(Pyramid(maps, (8, 16), [(64, 64)] * 2, [(64, 64)] * 2, (64, 64)), objects)
    sum(loss.sum() for loss in output.losses.values()).backward()
    assert output.samples.boxes.shape == (2, 80, 4)


# Detection, parameters


def test_detections_are_cut_to_the_image_and_do_not_overlap_within_a_class() -> None:
    torch.manual_seed(1)
    head = silent_head((8, 16))
    torch.nn.init.normal_(head.atss_cls.weight, std=0.1)
    found = head.predict(make_pyramid([(64, 64), (40, 56)]))
    for detections, (height, width) in zip(found, [(64, 64), (40, 56)]):
        boxes, scores = detections.boxes_px, detections.scores
        assert 0 < len(scores) <= 100 and torch.equal(scores, scores.sort(descending=True)[0])
        assert boxes.min() >= 0 and boxes[:, 2].max() == width and boxes[:, 3].max() == height
        assert scores.max() < 0.5, "the class probability times the centreness, which is 1/2"
        same = detections.labels[:, None] == detections.labels
        assert (box_iou(boxes, boxes) * same).fill_diagonal_(0).max() <= 0.6
        assert detections.labels.unique().tolist() == list(range(CLASSES))


def test_a_deltas_std_and_the_scale_of_its_level_move_a_detection() -> None:
    head = silent_head((8, 16))
    torch.nn.init.constant_(head.atss_cls.bias, -10)
    head.atss_reg.bias.data[0] = 1.0  # dx: 0.1 anchor widths per level scale
    head.scales[1].scale.data.fill_(2.0)
    _, deltas, _ = head.outputs(make_pyramid([(64, 64)]))
    anchors = head.grid.anchors([(8, 8), (4, 4)], "cpu")
    moved = (head.coder.decode(anchors, deltas) - anchors)[0, :, 0]
    torch.testing.assert_close(moved[:64], torch.full((64,), 6.4))  # of 64 pixels
    torch.testing.assert_close(moved[64:], torch.full((16,), 25.6))  # of 128 pixels, twice as far


def test_parameters_have_the_published_names() -> None:
    names = {name for name, _ in ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16)).named_parameters()}
    towers = {f"{t}_convs.0.{p}" for t in ("cls", "reg") for p in ("conv.weight", "gn.weight", "gn.bias")}
    outputs = {f"atss_{o}.{p}" for o in ("cls", "reg", "centerness") for p in ("weight", "bias")}
    assert names == towers | outputs | {"scales.0.scale", "scales.1.scale"}


def test_initial_values() -> None:
    head = ATSSHead(num_classes=80, width=64)
    for layer in (head.cls_convs[0].conv, head.reg_convs[0].conv, head.atss_cls, head.atss_reg, head.atss_centerness):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert head.atss_cls.bias.tolist() == pytest.approx([-4.59512] * 80, abs=1e-5)
    assert head.atss_reg.bias.abs().sum() == 0 == head.atss_centerness.bias.abs().sum()
    assert [scale.scale.item() for scale in head.scales] == [1.0] * 5


def test_a_pyramid_with_other_strides_is_refused() -> None:
    head = ATSSHead(num_classes=CLASSES, width=WIDTH, strides=(8, 16))
    with pytest.raises(ValueError, match=r"built for strides \(8, 16\), the pyramid has \(16, 32\)"):
        head(make_pyramid([(64, 64)], (16, 32)), make_objects([]))
