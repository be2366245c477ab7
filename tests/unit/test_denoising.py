"""Denoising queries: noise, slots, who sees them, what they are taught (DINO, section 3.3)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from main import get_args_parser
from models import build_model
from models.groups import denoising
from models.groups.base import Context
from models.groups.denoising import Denoising, Noise, draw_noise, noised_boxes, noised_labels, number_of_groups
from tests.tiny import tiny_images
from tests.waits import Waits
from util.errors import UserError
from util.structures import FlatTargets, Target

CPU = torch.device("cpu")
DINO = (
    "--backbone resnet18 --backbone_weights none --num_classes 5 --enc_layers 1 --dec_layers 2 --hidden_dim 64 "
    "--dim_feedforward 96 --num_queries 20 --dropout 0 --with_box_refine --two_stage --mixed_selection "
    "--look_forward_twice --query_pos box --decoder_norm --share_heads --dn_number 60"
)
SIZES = [(96, 128), (80, 101)]


def targets_of(*counts: int) -> list[Target]:
    torch.manual_seed(1)
    boxes = [torch.cat([0.3 + 0.4 * torch.rand(n, 2), 0.1 + 0.2 * torch.rand(n, 2)], 1) for n in counts]
    return [Target(torch.arange(n) % 5, b, image_id=i, orig_size=(8, 8)) for i, (n, b) in enumerate(zip(counts, boxes))]


def source(**more) -> Denoising:
    return Denoising(8, num_classes=5, rows=6, layers=2, **more)


def context(targets: list[Target] | None) -> Context:
    return Context(images=None, memory=None, seeds=None, targets=targets, epoch=0, output=None)


# noise


def test_a_label_is_replaced_below_half_of_the_ratio() -> None:
    noise = Noise(torch.tensor([[[0.24, 0.25]]]), torch.tensor([[[4, 4]]]), None, None)
    assert noised_labels(torch.tensor([1, 2]), noise, 0.5).tolist() == [[[4, 2]]]


def test_corners_move_by_half_sides_and_negatives_a_whole_half_side_further() -> None:
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4]])  # corners 0.4 0.3 0.6 0.7
    sign, size = torch.ones(1, 2, 1, 4), torch.full((1, 2, 1, 4), 0.5)
    positive, negative = noised_boxes(box, Noise(None, None, sign, size), 1.0)[0, :, 0]
    torch.testing.assert_close(positive, torch.tensor([0.55, 0.6, 0.2, 0.4]))  # by 0.05, 0.1
    torch.testing.assert_close(negative, torch.tensor([0.65, 0.8, 0.2, 0.4]))  # by 0.15, 0.3


def test_corners_stay_in_the_image_and_may_change_places() -> None:
    box = torch.tensor([[0.5, 0.5, 0.8, 0.2]])  # corners 0.1 0.4 0.9 0.6
    sign = torch.tensor([1.0, 1.0, -1.0, 1.0]).expand(1, 2, 1, 4)
    noise = Noise(None, None, sign, torch.full((1, 2, 1, 4), 0.75))
    negative = noised_boxes(box, noise, 1.0)[0, 1, 0]  # x: 0.1 + 0.7 = 0.8, 0.9 - 0.7 = 0.2; y: 0.575, 0.775
    torch.testing.assert_close(negative, torch.tensor([0.5, 0.675, -0.6, 0.2]))
    far = noised_boxes(torch.tensor([[0.9, 0.5, 0.2, 0.2]]), Noise(None, None, torch.ones(1, 2, 1, 4), noise.size), 1.0)
    torch.testing.assert_close(far[0, 1, 0, 0], torch.tensor(0.9875))  # corners 0.975 and 1, not 1.175


@pytest.mark.parametrize(
    ("number", "most", "always", "groups"),
    [
        (100, 7, False, 14),
        (100, 3, False, 33),
        (50, 60, False, 1),
        (49, 7, False, 98),
        (49, 7, True, 7),
        (12, 0, True, 1),
    ],
)
def test_groups_follow_the_fullest_image(number: int, most: int, always: bool, groups: int) -> None:
    assert number_of_groups(number, most, always_divide=always) == groups


def test_drawn_noise_has_signs_shares_and_classes() -> None:
    torch.manual_seed(0)
    noise = draw_noise(50, 20, 7, CPU)
    assert set(noise.sign.unique().tolist()) == {-1.0, 1.0}
    assert set(noise.new_label.unique().tolist()) == set(range(7))
    for share in (noise.label, noise.size):
        assert share.min() >= 0 and share.max() < 1 and abs(share.mean() - 0.5) < 0.05


# queries


def test_slots_are_group_after_group_positives_then_negatives() -> None:
    dn, targets = source(), FlatTargets.of(targets_of(2, 1))
    noise = draw_noise(3, 3, 5, CPU)
    content, reference = dn.embed(targets, noise, 2)
    assert content.shape == (2, 12, 8) and reference.shape == (2, 12, 4)
    filled = (content != 0).any(-1)
    assert filled.tolist() == [[True] * 12, [True, False] * 6]
    assert (reference[~filled] == 0.5).all()
    labels = noised_labels(targets.labels, noise, 0.5)
    second_negative = dn.published["label_enc"].weight[labels[1, 1, 0]]  # group 1, negative, first object
    assert torch.equal(content[0, 1 * 4 + 2 + 0], second_negative)


def test_positives_are_paired_with_their_objects_on_every_layer() -> None:
    pairs = source().pairs(FlatTargets.of(targets_of(2, 0, 1)), groups=2, most=2)
    found = list(zip(pairs.layer.tolist(), pairs.image.tolist(), pairs.slot.tolist(), pairs.target.tolist()))
    one_layer = [(0, 0, 0), (0, 1, 1), (2, 0, 0), (0, 4, 0), (0, 5, 1), (2, 4, 0)]
    assert found == [(layer, *pair) for layer in range(2) for pair in one_layer]
    assert (pairs.count, pairs.factor) == (3.0, 2)


def test_training_without_targets_says_so() -> None:
    with pytest.raises(ValueError, match="denoising queries are made of targets"):
        source()(context(None))


def test_an_image_without_objects_keeps_the_label_table_in_the_graph() -> None:
    dn = source()
    (group,) = dn(context(targets_of(0, 0)))
    assert group.content.shape == (2, 0, 8)
    group.content.sum().backward()
    assert dn.published["label_enc"].weight.grad.abs().sum() == 0


def test_the_number_of_queries_is_bounded_in_crowds() -> None:
    (group,) = source(number=100)(context(targets_of(30, 2)))
    assert len(group) == 2 * 3 * 30
    (group,) = source(number=100)(context(targets_of(400, 2)))
    assert len(group) == 2 * 400  # one group at least


def test_making_the_queries_waits_for_nothing() -> None:
    dn, targets = source(), targets_of(3, 0, 1)
    with Waits() as waits:
        dn(context(targets))
    assert not waits.found


# in a detector


def outputs(flags: str, targets: list[Target]) -> tuple:
    torch.manual_seed(3)
    model, criterion, _ = build_model(get_args_parser().parse_args(flags.split()))
    torch.manual_seed(4)
    return model, criterion, model.train()(tiny_images(SIZES), targets)


def test_matching_queries_say_the_same_with_and_without_denoising() -> None:
    """Both have the same weights."""
    targets = targets_of(3, 1)
    with_dn, _, output = outputs(DINO, targets)
    without, _, _ = outputs(DINO.replace("--dn_number 60", "--dn_number 0"), targets)
    state = {n: v for n, v in with_dn.state_dict().items() if n in without.state_dict()}
    without.load_state_dict(state)
    alone = without.train()(tiny_images(SIZES), targets)
    assert set(output.sets) == {*alone.sets, "dn"}
    for name in alone.sets:
        for ours, theirs in zip(_numbers(output, name), _numbers(alone, name)):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _numbers(output, name: str) -> tuple[Tensor, Tensor]:
    return output.sets[name].predictions.logits, output.sets[name].predictions.boxes


def test_denoising_queries_of_a_group_do_not_depend_on_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, drawn = targets_of(3, 3), []

    def draw(groups: int, objects: int, classes: int, device: torch.device) -> Noise:
        noise = draw_noise(groups, objects, classes, device)
        if drawn:  # another noise in the last group only
            first = drawn[0]
            keep = torch.arange(groups).view(-1, 1, 1) < groups - 1
            noise = Noise(
                torch.where(keep, first.label, noise.label),
                torch.where(keep, first.new_label, noise.new_label),
                torch.where(keep[..., None], first.sign, noise.sign),
                torch.where(keep[..., None], first.size, noise.size),
            )
        drawn.append(noise)
        return noise

    monkeypatch.setattr(denoising, "draw_noise", draw)
    model, _, first = outputs(DINO, targets)
    second = model(tiny_images(SIZES), targets)
    for ours, theirs in zip(_numbers(first, "dn"), _numbers(second, "dn")):
        torch.testing.assert_close(ours[:, :, :-6], theirs[:, :, :-6], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ours[:, :, -6:], theirs[:, :, -6:], atol=1e-3)


def test_losses_of_denoising_are_divided_by_objects_times_groups() -> None:
    targets = targets_of(4, 2)
    _, criterion, output = outputs(DINO, targets)
    dn = output.sets["dn"]
    report = criterion(output, targets)
    (taught,) = dn.supervision
    pairs = taught.assign
    assert pairs.factor == 15
    last = pairs.layer == 1
    wanted = torch.cat([t.boxes for t in targets]).repeat(15, 1)
    found = dn.predictions.boxes[1][pairs.image[last], pairs.slot[last]]
    torch.testing.assert_close(report.terms["loss_bbox_dn"], (found - wanted).abs().sum().detach() / (6 * 15))


@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (120, 3)])
def test_every_parameter_has_a_gradient_whatever_the_images_show(counts: tuple[int, int]) -> None:
    targets = targets_of(*counts)
    model, criterion, output = outputs(DINO, targets)
    report = criterion(output, targets)
    report.total.backward()
    assert torch.isfinite(report.total)
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_inference_has_no_denoising_queries_and_needs_no_targets() -> None:
    model, _, _ = outputs(DINO, targets_of(1, 1))
    assert "dn" not in model.eval()(tiny_images(SIZES)).sets


def test_a_class_above_the_label_table_is_refused_before_training() -> None:
    from util.arg_rules import check_args

    args = get_args_parser().parse_args([*DINO.split(), "--dn_labelbook_size", "3"])
    with pytest.raises(UserError, match="--dn_labelbook_size 3: a row for each of the 5 classes"):
        check_args(args)


def test_boxes_in_half_precision_make_references_in_single_precision() -> None:

    targets = [replace(t, boxes=t.boxes.half()) for t in targets_of(2, 1)]
    (group,) = source()(context(targets))
    assert group.reference.dtype == torch.float32
