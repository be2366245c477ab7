"""Losses: values by hand, names, normalisers, empty batches."""

from __future__ import annotations

import math

import pytest
import torch

from models import build_criterion
from models.criterion import loss_name
from models.losses import cardinality_error, class_error
from tests.tiny import make_target, tiny_args
from util.structures import Assignment, DetectorOutput, Predictions, SupervisedSet, Supervision, TargetPairs


def one_set(logits: torch.Tensor, boxes: torch.Tensor, **supervision) -> DetectorOutput:
    return DetectorOutput({"one2one": SupervisedSet(Predictions(logits, boxes), (Supervision(**supervision),))})


def criterion(flags: str = ""):
    return build_criterion(tiny_args(flags))


def test_losses_of_one_slot_and_one_target_by_hand() -> None:
    logits = torch.zeros(1, 1, 1, 2)
    boxes = torch.tensor([[[[0.5, 0.5, 0.4, 0.4]]]])
    report = criterion()(one_set(logits, boxes), [make_target([[0.5, 0.5, 0.2, 0.4]], [1])])
    # p = 0.5 everywhere: 0.25 * 0.25 * log 2 for the positive, 0.75 * 0.25 * log 2 for the negative class
    assert report.terms["loss_ce"].item() == pytest.approx(0.25 * math.log(2))
    assert report.terms["loss_bbox"].item() == pytest.approx(0.2)
    assert report.terms["loss_giou"].item() == pytest.approx(0.5)
    assert report.total.item() == pytest.approx(2 * 0.25 * math.log(2) + 5 * 0.2 + 2 * 0.5)


def test_loss_names_are_those_of_the_family() -> None:
    assert loss_name("loss_ce", "one2one", 5, last=5) == "loss_ce"
    assert loss_name("loss_ce", "one2one", 0, last=5) == "loss_ce_0"
    assert loss_name("loss_giou", "encoder", 0, last=0) == "loss_giou_enc"
    assert loss_name("loss_giou", "encoder_one2many", 0, last=0) == "loss_giou_enc_one2many"
    assert loss_name("loss_bbox", "one2many", 5, last=5) == "loss_bbox_one2many"
    assert loss_name("loss_bbox", "one2many", 3, last=5) == "loss_bbox_3_one2many"


def test_class_error_is_100_without_any_match_and_0_when_all_are_right() -> None:
    logits = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    empty = torch.zeros(0, dtype=torch.long)
    none = class_error(logits, TargetPairs(empty, torch.zeros(0, 4)), Assignment(empty, empty, empty, empty), 0)
    assert none.item() == 100
    zeros, slots = torch.zeros(2, dtype=torch.long), torch.tensor([0, 1])
    pairs = TargetPairs(torch.tensor([1, 0]), torch.zeros(2, 4))
    assert class_error(logits, pairs, Assignment(zeros, zeros, slots, zeros), 0).item() == 0


def test_cardinality_error_counts_slots_whose_best_class_is_not_the_last() -> None:
    logits = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]])
    assert cardinality_error(logits, torch.tensor([5])).tolist() == [3.0]


def test_a_batch_without_objects_gives_a_finite_loss_and_full_gradients() -> None:
    logits = torch.randn(2, 2, 5, 3, requires_grad=True)
    boxes = torch.rand(2, 2, 5, 4, requires_grad=True)
    report = criterion()(one_set(logits, boxes), [make_target(), make_target()])
    report.total.backward()
    assert report.terms["loss_bbox"] == report.terms["loss_giou"] == 0
    probability = logits.detach().sigmoid()  # nothing but negatives, divided by 1 where there is no object
    negatives = 0.75 * probability**2 * -(1 - probability).log()
    assert report.terms["loss_ce_0"].item() == pytest.approx(negatives[0].sum().item(), rel=1e-5)
    assert torch.isfinite(report.total)
    assert (boxes.grad == 0).all() and (logits.grad != 0).all()


def test_without_auxiliary_losses_only_the_last_layer_counts_but_all_keep_a_gradient() -> None:
    logits = torch.randn(3, 1, 4, 3, requires_grad=True)
    boxes = torch.rand(3, 1, 4, 4, requires_grad=True)
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    report = criterion("--no_aux_loss")(one_set(logits, boxes), [target])
    report.total.backward()
    assert "loss_ce_0" not in report.terms and "loss_ce" in report.terms
    assert (logits.grad[:2] == 0).all() and (logits.grad[2] != 0).any()


def test_layers_outside_a_supervision_are_not_taught_by_it() -> None:
    logits, boxes = torch.randn(4, 1, 6, 3), torch.rand(4, 1, 6, 4)
    teach = (Supervision(layers=range(0, 2), repeat=3), Supervision(layers=range(2, 4)))
    output = DetectorOutput({"one2one": SupervisedSet(Predictions(logits, boxes), teach)})
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    report = criterion()(output, [target])
    ones = criterion()(one_set(logits, boxes), [target])
    assert report.terms["loss_bbox_2"] == ones.terms["loss_bbox_2"]
    assert report.terms["loss_bbox_0"] != ones.terms["loss_bbox_0"]
    assert {k for k in report.terms if k.startswith("loss_ce")} == {"loss_ce", "loss_ce_0", "loss_ce_1", "loss_ce_2"}


def test_a_supervision_of_no_layer_teaches_nothing() -> None:
    logits = torch.randn(2, 1, 6, 3, requires_grad=True)
    report = criterion()(one_set(logits, torch.rand(2, 1, 6, 4), layers=range(0)), [make_target([[0.5] * 4], [0])])
    assert not report.terms and not report.weights
    report.total.backward()
    assert (logits.grad == 0).all()


def test_one_to_many_with_one_repeat_is_one_to_one() -> None:
    logits, boxes = torch.randn(2, 1, 6, 3), torch.rand(2, 1, 6, 4)
    target = make_target([[0.5, 0.5, 0.2, 0.2], [0.2, 0.3, 0.1, 0.1]], [0, 2])
    supervised = SupervisedSet(Predictions(logits, boxes), (Supervision(),))
    report = criterion()(DetectorOutput({"one2one": supervised, "one2many": supervised}), [target])
    for name in ("loss_ce", "loss_bbox_0", "loss_giou"):
        assert report.terms[name] == report.terms[f"{name}_one2many"]


def test_the_weight_of_a_supervision_scales_its_losses_and_its_log_only_entries() -> None:
    logits, boxes = torch.randn(1, 1, 6, 3), torch.rand(1, 1, 6, 4)
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    plain = criterion()(one_set(logits, boxes), [target])
    scaled = criterion()(one_set(logits, boxes, weight=0.5), [target])
    for name in ("loss_ce", "cardinality_error", "class_error"):
        assert scaled.terms[name].item() == pytest.approx(0.5 * plain.terms[name].item())


def test_empty_slots_are_neither_positive_nor_negative() -> None:
    logits, boxes = torch.randn(1, 1, 4, 3), torch.rand(1, 1, 4, 4)
    padding = torch.tensor([[False, False, True, True]])
    padded = Predictions(logits, boxes, padding=padding)
    whole = Predictions(logits[:, :, :2], boxes[:, :, :2])
    results = [
        criterion()(DetectorOutput({"one2one": SupervisedSet(p, (Supervision(),))}), [make_target()])
        for p in (padded, whole)
    ]
    assert results[0].terms["loss_ce"].item() == pytest.approx(results[1].terms["loss_ce"].item())


def test_ready_made_pairs_take_the_same_path_as_matched_ones() -> None:
    logits, boxes = torch.randn(1, 1, 2, 3), torch.rand(1, 1, 2, 4)
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    zero = torch.zeros(1, dtype=torch.long)
    pairs = Assignment(zero, zero, torch.tensor([1]), zero, count=1.0)
    report = criterion()(one_set(logits, boxes, assign=pairs), [target])
    expected = (boxes[0, 0, 1] - target.boxes[0]).abs().sum()
    assert report.terms["loss_bbox"].item() == pytest.approx(expected.item())


def test_ready_made_pairs_of_all_layers_work_without_auxiliary_losses() -> None:
    logits, boxes = torch.randn(3, 1, 2, 3), torch.rand(3, 1, 2, 4)
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    layer, zeros = torch.arange(3), torch.zeros(3, dtype=torch.long)
    ignore = torch.zeros(3, 1, 2, dtype=torch.bool)
    ignore[:2] = True
    pairs = Assignment(layer, zeros, torch.tensor([0, 0, 1]), zeros, torch.tensor([9.0, 9.0, 0.5]), ignore, count=1.0)
    output = one_set(logits, boxes, assign=pairs)
    report, full = criterion("--no_aux_loss")(output, [target]), criterion()(output, [target])
    assert set(report.terms) == {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"}
    for name, value in report.terms.items():
        assert value.item() == pytest.approx(full.terms[name].item()), name
    expected = 0.5 * (boxes[2, 0, 1] - target.boxes[0]).abs().sum()
    assert report.terms["loss_bbox"].item() == pytest.approx(expected.item())


def test_a_weighted_pair_counts_its_share_and_an_ignored_slot_is_no_negative() -> None:
    logits, boxes = torch.zeros(1, 1, 2, 1), torch.tensor([[[[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]]]])
    target = make_target([[0.5, 0.5, 0.2, 0.4]], [0])
    zero, ignore = torch.zeros(1, dtype=torch.long), torch.tensor([[[False, True]]])
    pairs = Assignment(zero, zero, zero, zero, weight=torch.tensor([0.5]), ignore=ignore, count=1.0)
    report = criterion()(one_set(logits, boxes, assign=pairs), [target])
    assert report.terms["loss_bbox"].item() == pytest.approx(0.5 * 0.2)
    assert report.terms["loss_giou"].item() == pytest.approx(0.5 * 0.5)
    # p = 0.5 for a soft target of 0.5: alpha and (1 - p_t)^2 are 0.5 and 0.25; the other slot is left out
    assert report.terms["loss_ce"].item() == pytest.approx(0.5 * 0.25 * math.log(2))


def test_losses_of_assigners_and_of_auxiliary_heads_are_logged_and_part_of_the_total() -> None:
    logits, boxes = torch.randn(2, 1, 2, 3), torch.rand(2, 1, 2, 4)
    target = make_target([[0.5, 0.5, 0.2, 0.2]], [0])
    zero = torch.zeros(1, dtype=torch.long)
    plain = Assignment(zero, zero, zero, zero, count=1.0)
    taught = Assignment(zero, zero, zero, zero, count=1.0, losses={"loss_soft": torch.tensor([1.0, 4.0])})
    without = criterion()(one_set(logits, boxes, assign=plain, weight=0.5), [target])
    output = one_set(logits, boxes, assign=taught, weight=0.5)
    output.aux_losses["loss_dense"] = torch.tensor(3.0)
    report = criterion()(output, [target])
    assert report.terms["loss_soft_0"].item() == 0.5 * 1
    assert report.terms["loss_soft"].item() == 0.5 * 4
    assert report.terms["loss_dense"].item() == 3
    assert report.total.item() == pytest.approx(without.total.item() + 0.5 * (1 + 4) + 3)


def test_the_order_of_targets_changes_nothing() -> None:
    logits, boxes = torch.randn(2, 1, 6, 3), torch.rand(2, 1, 6, 4)
    forward = make_target([[0.5, 0.5, 0.2, 0.2], [0.2, 0.3, 0.1, 0.1]], [0, 2])
    backward = make_target([[0.2, 0.3, 0.1, 0.1], [0.5, 0.5, 0.2, 0.2]], [2, 0])
    totals = [criterion()(one_set(logits, boxes), [t]).total.item() for t in (forward, backward)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)


def mixed_sets(stacked: bool) -> tuple[DetectorOutput, list[torch.Tensor]]:
    """Return three sets of three layers and two images, cut out of one stack or each with tensors of its own.

    The first is matched on all layers; the second by layer, with other repeats; the third has ready-made weighted pairs
    on two of its layers, a slot to ignore and an empty one.
    """
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(3, 2, 9, c, generator=generator) for c in (4, 4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    logits, boxes = leaves[0], leaves[1].sigmoid() * 0.5 + 0.2
    empty = torch.zeros(2, 9, dtype=torch.bool)
    empty[1, 8] = True
    index = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 2, 1], [0, 1, 0]])  # layer of two, image, slot of three, target
    ignore = torch.zeros(2, 2, 3, dtype=torch.bool)
    ignore[1, 0, 0] = True
    ready = Assignment(*index, weight=torch.tensor([1.0, 0.5, 0.2]), ignore=ignore, count=2.0)
    supervisions = {
        "one2one": (Supervision(),),
        "many": (Supervision(layers=range(1), repeat=2), Supervision(layers=range(1, 3), weight=0.5)),
        "ready": (Supervision(ready, layers=range(1, 3), weight=2.0),),
    }
    sets = {}
    stack = Predictions(logits, boxes, empty)
    for i, (name, taught) in enumerate(supervisions.items()):
        slots = slice(3 * i, 3 * i + 3)
        own = Predictions(logits[:, :, slots], boxes[:, :, slots], empty[:, slots])
        sets[name] = SupervisedSet(own, taught, stack, 3 * i) if stacked else SupervisedSet(own, taught)
    return DetectorOutput(sets), leaves


def test_sets_cut_out_of_one_stack_are_taught_as_if_each_stood_alone() -> None:
    targets = [
        make_target([[0.3, 0.4, 0.2, 0.3], [0.7, 0.6, 0.4, 0.2]], [1, 3]),
        make_target([[0.5, 0.5, 0.3, 0.3]], [2]),
    ]
    reports, gradients, evaluations = [], [], []
    for stacked in (True, False):
        output, leaves = mixed_sets(stacked)
        whole = criterion()
        count = []
        terms = dict(whole.terms)
        for name, term in terms.items():
            whole.terms[name] = lambda *a, f=term, n=count: n.append(1) or f(*a)
        report = whole(output, targets)
        reports.append(report.terms)
        evaluations.append(len(count))
        gradients.append(torch.autograd.grad(report.total, leaves))
    assert evaluations == [2, 6]  # two terms, once for the stack or for each of three sets
    assert reports[0].keys() == reports[1].keys()
    for name, value in reports[0].items():
        assert value.item() == pytest.approx(reports[1][name].item(), rel=1e-5, abs=1e-6), name
    for ours, theirs in zip(*gradients):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_two_supervisions_of_the_same_slots_and_layers_are_both_taught() -> None:
    logits, boxes = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, 0.5, 0.4, 0.4]]]])
    target = [make_target([[0.5, 0.5, 0.2, 0.4]], [0])]
    once, twice = (
        DetectorOutput({"one2one": SupervisedSet(Predictions(logits, boxes), (Supervision(),) * n)}) for n in (1, 2)
    )
    assert criterion()(twice, target).total.item() == pytest.approx(2 * criterion()(once, target).total.item())
