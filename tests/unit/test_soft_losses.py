"""Losses of the learned matcher: which loss trains what, class targets, and that all but the weights is shared."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from models.assign import HungarianMatcher, SoftMatcher
from models.losses import box_regression, focal_classification, pairwise_classification, soft_classification
from tests.tiny import make_target
from tests.unit.soft_cases import (
    dense,
    found_by,
    output_of,
    random_predictions,
    random_target,
    request_of,
    soft_criterion,
    soft_matcher,
)
from util.structures import Assignment, Predictions, TargetPairs

CORR = ("loss_corr",)
QUERY = ("loss_ce", "loss_bbox", "loss_giou")

# What each loss trains: logits, boxes, embeddings, probe. A cell that is not named gets exactly nothing.
TABLE = {
    "soft": ("soft", "", {"loss_corr": "probe", "loss_ce": "logits", "loss_bbox": "boxes", "loss_giou": "boxes"}),
    "probe+query": ("soft", "--corr_grad probe+query", {"loss_corr": "embeds probe", "loss_giou": "boxes"}),
    "full": ("soft", "--corr_grad full", {"loss_corr": "logits boxes embeds probe", "loss_ce": "logits"}),
    "live weights": (
        "soft",
        "--live_weights --cls_target pairwise --corr_grad probe+query",
        {"loss_corr": "embeds probe", "loss_ce": "logits embeds probe", "loss_giou": "boxes embeds probe"},
    ),
    "literal": (
        "soft-literal",
        "",
        {
            "loss_corr": "logits boxes embeds probe",
            "loss_ce": "logits embeds probe",
            "loss_bbox": "boxes embeds probe",
            "loss_giou": "boxes embeds probe",
        },
    ),
    "hard targets": ("soft", "--cls_target quality", {"loss_ce": "logits", "loss_bbox": "boxes"}),
    "a probe for each layer": (
        "soft",
        "--probe_per_layer",
        {"loss_corr": "probe", "loss_ce": "logits", "loss_giou": "boxes"},
    ),
    "consistent layers": (
        "soft",
        "--layer_consistency last",
        {"loss_corr": "probe", "loss_ce": "logits", "loss_bbox": "boxes"},
    ),
    "mean predictions": ("soft", "--probe_value prediction", {"loss_corr": "probe", "loss_bbox": "boxes"}),
    "mean predictions, probe+query": (
        "soft",
        "--probe_value prediction --corr_grad probe+query",
        {"loss_corr": "embeds probe"},
    ),
    "mean predictions, full": (
        "soft",
        "--probe_value prediction --corr_grad full",
        {"loss_corr": "logits boxes embeds probe", "loss_ce": "logits"},
    ),
    "mean predictions, literal": (
        "soft-literal",
        "--probe_value prediction",
        {"loss_corr": "logits boxes embeds probe", "loss_giou": "boxes embeds probe"},
    ),
}
CELLS = [(form, loss) for form, (_, _, losses) in TABLE.items() for loss in losses]


@pytest.mark.parametrize(("form", "loss"), CELLS, ids=str)
def test_each_loss_trains_what_the_table_says_and_nothing_else(form: str, loss: str) -> None:
    matcher, flags, expected = TABLE[form]
    criterion = soft_criterion(flags, matcher)
    predictions = random_predictions(layers=2, grad=True)
    # Only one loss has a weight; the others of its term are computed and must not matter.
    criterion.weights = {name: float(name == loss) for name in criterion.weights}
    criterion(output_of(predictions), [random_target(4), random_target(2)], 0.0).total.backward()
    probe = [p.grad for p in criterion.parameters()]
    found = {
        "logits": [predictions.logits.grad],
        "boxes": [predictions.boxes.grad],
        "embeds": [x.grad for x in predictions.embeds],
        "probe": probe,
    }
    trained = {name for name, grads in found.items() if any(g is not None and g.abs().sum() > 0 for g in grads)}
    assert trained == set(expected[loss].split())


class TaughtByTheSolver(SoftMatcher):
    """Its correspondence is the optimal matching."""

    def correspond(self, request):
        found = super().correspond(request)
        (pairs,) = HungarianMatcher()([request])
        one_hot = dense(replace(pairs, weight=torch.ones(len(pairs))), request.predictions, found.valid.shape[1])
        found.c = one_hot.flatten(0, 1)
        found.log_c = torch.where(found.c > 0, 0.0, -50.0)
        return found


@pytest.mark.parametrize(
    ("matcher", "flags"),
    [
        ("soft", ""),
        ("soft", "--scg rounds"),
        ("soft", "--scg rowpeak"),
        ("soft", "--cls_target hard"),
        ("soft-literal", ""),
    ],
)
def test_with_the_optimal_correspondence_all_losses_are_those_of_hungarian_matching(matcher: str, flags: str) -> None:
    targets, results = [random_target(5, seed=3), random_target(2)], []
    for name, more in (("hungarian", ""), (matcher, flags)):
        criterion, predictions = soft_criterion(more, name), random_predictions(layers=3, grad=True)
        if name != "hungarian":
            criterion.assigners["queries"].__class__ = TaughtByTheSolver
            criterion.weights["loss_corr"] = 0.0
        report = criterion(output_of(predictions), targets)
        results.append((report, torch.autograd.grad(report.total, [predictions.logits, predictions.boxes])))
    (ours, our_gradients), (theirs, their_gradients) = results
    for key in ours.terms:
        assert theirs.terms[key].item() == pytest.approx(ours.terms[key].item(), rel=1e-5, abs=1e-6), key
    for a, b in zip(our_gradients, their_gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_correspondence_loss_is_the_expected_cost_per_object_of_each_layer() -> None:
    predictions, targets = random_predictions(), [random_target(3), random_target(1)]
    criterion = soft_criterion("--corr_loss_coef 0.5")
    found = found_by(criterion.assigners["queries"], request_of(predictions, targets))
    expected = (found.c * found.costs.total).view(2, -1).sum(1) / 4
    report = criterion(output_of(predictions), targets)
    assert report.terms["loss_corr_0"].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert report.terms["loss_corr"].item() == pytest.approx(expected[1].item(), rel=1e-5)
    assert report.weights["loss_corr"] == report.weights["loss_corr_0"] == 0.5


def test_costs_of_pairs_are_those_of_the_solver_up_to_a_constant() -> None:
    predictions, targets = random_predictions(), [random_target(3), random_target(5)]
    request = request_of(predictions, targets)
    found = soft_matcher().correspond(request)
    reference = HungarianMatcher().costs(predictions, request.targets)  # (T, L, N)
    ours = found.costs.total.view(2, 2, 8, 12)[:, found.targets.image, found.targets.row].transpose(0, 1)
    torch.testing.assert_close(ours, reference + 2.0)  # 1 - GIoU in place of -GIoU


def test_three_hundred_steps_on_frozen_predictions_teach_the_probe_the_optimal_pairs() -> None:
    generator = torch.Generator().manual_seed(5)
    cells = torch.stack([torch.randperm(16, generator=generator) for _ in range(8)])  # a 4 x 4 grid of 16 queries
    centres = torch.stack([cells % 4, cells // 4], -1) / 4 + 0.125
    boxes = torch.cat([centres, torch.full_like(centres, 0.15)], -1)[None]
    boxes = boxes + 0.02 * torch.randn(boxes.shape, generator=generator)
    predictions = random_predictions(layers=1, images=8, slots=16)
    predictions.boxes, predictions.logits = boxes, predictions.logits * 0.1
    targets = []
    for image in range(8):
        chosen = torch.randperm(16, generator=generator)[: 3 + image % 4]
        jitter = 0.02 * torch.randn(len(chosen), 4, generator=generator)
        targets.append(make_target((boxes[0, image, chosen] + jitter).tolist(), [i % 4 for i in range(len(chosen))]))
    matcher = soft_matcher("--soft_warmup none")
    optimizer = torch.optim.AdamW(matcher.parameters(), lr=3e-3)
    request = request_of(predictions, targets)
    matcher.eval()
    assert matcher([request])[0].logs["agree"] < 0.5
    for _ in range(300):
        optimizer.zero_grad()
        costs = matcher.train().correspond(request)
        (matcher._losses(costs)["loss_corr"].sum() / 36).backward()
        optimizer.step()
    assert matcher.eval()([request])[0].logs["agree"] > 0.95


# class terms


def one_slot(logit: float, classes: int = 2) -> Predictions:
    logits = torch.full((1, 1, 1, classes), logit)
    return Predictions(logits, torch.tensor([[[[0.5, 0.5, 0.4, 0.4]]]]))


def pairs_at(
    weights: list[float], labels: list[int], score: list[float] | None = None
) -> tuple[TargetPairs, Assignment]:
    """Return pairs of the only slot, of which the targets are boxes of half the slot's width."""
    zeros = torch.zeros(len(weights), dtype=torch.long)
    score = None if score is None else torch.tensor(score)
    pairs = TargetPairs(torch.tensor(labels), torch.tensor([[0.5, 0.5, 0.2, 0.4]]).expand(len(weights), 4))
    return pairs, Assignment(zeros, zeros, zeros, zeros, weight=torch.tensor(weights), score=score)


def loss_of(term, predictions: Predictions, pairs: TargetPairs, assignment: Assignment) -> float:
    return term(predictions, pairs, assignment)["loss_ce"].sum().item()


def test_a_weight_as_target_by_hand() -> None:
    # p = .5: positive .25 (.8 - .5)^2 log 2, negative class .75 .25 log 2
    expected = (0.25 * 0.3**2 + 0.75 * 0.25) * math.log(2)
    assert loss_of(soft_classification, one_slot(0.0), *pairs_at([0.8], [1])) == pytest.approx(expected)


@pytest.mark.parametrize("term", [focal_classification, soft_classification])
def test_of_several_pairs_of_a_slot_and_a_class_the_strongest_is_the_target(term) -> None:
    one = loss_of(term, one_slot(0.3), *pairs_at([0.7], [1]))
    for weights in ([0.7, 0.2], [0.2, 0.7], [0.7, 0.0]):
        assert loss_of(term, one_slot(0.3), *pairs_at(weights, [1, 1])) == pytest.approx(one)


def test_targets_of_0_and_1_give_the_focal_loss() -> None:
    predictions = random_predictions()
    (pairs,) = HungarianMatcher()([request_of(predictions, [random_target(4), random_target(2)])])
    labels = TargetPairs(torch.arange(len(pairs)) % 4, torch.full((len(pairs), 4), 0.5))
    expected = focal_classification(predictions, labels, pairs)["loss_ce"]
    for term in (soft_classification, pairwise_classification):
        torch.testing.assert_close(term(predictions, labels, pairs)["loss_ce"], expected)


def test_an_extra_pair_leaves_its_class_out_unless_another_pair_wants_it() -> None:
    negative = 0.75 * 0.25 * math.log(2)
    assert loss_of(soft_classification, one_slot(0.0), *pairs_at([0.3], [1], [-1.0])) == pytest.approx(negative)
    wanted = loss_of(soft_classification, one_slot(0.0), *pairs_at([0.3, 0.6], [1, 1], [-1.0, 1.0]))
    assert wanted == pytest.approx(negative + 0.25 * 0.25 * math.log(2))


def test_quality_takes_the_overlap_as_target() -> None:
    term = partial(soft_classification, quality=True)
    # Half the width: IoU .5, which is what p says
    assert loss_of(term, one_slot(0.0), *pairs_at([1.0], [1])) == pytest.approx(0.75 * 0.25 * math.log(2))


def test_without_a_balance_positives_and_negatives_count_the_same() -> None:
    # p = .2 for both classes, the target of class 1 is the overlap of .5 (Co-DINO: quality focal loss)
    term = partial(soft_classification, quality=True, alpha=-1)
    negative = 0.2**2 * -math.log(0.8)
    expected = 0.3**2 * -(0.5 * math.log(0.2) + 0.5 * math.log(0.8)) + negative
    assert loss_of(term, one_slot(-math.log(4)), *pairs_at([1.0], [1])) == pytest.approx(expected, rel=1e-5)
    expected = 0.8**2 * -math.log(0.2) + negative  # the target is 1
    for hard in (focal_classification, soft_classification, pairwise_classification):
        found = loss_of(partial(hard, alpha=-1), one_slot(-math.log(4)), *pairs_at([1.0], [1]))
        assert found == pytest.approx(expected, rel=1e-5), hard


def test_pairwise_losses_are_weighted_and_slots_without_a_pair_are_background() -> None:
    positive, negative = (f * 0.25 * math.log(2) for f in (0.25, 0.75))
    found = loss_of(pairwise_classification, one_slot(0.0), *pairs_at([0.6, 0.1], [0, 1]))
    assert found == pytest.approx(0.7 * (positive + negative))
    found = loss_of(pairwise_classification, one_slot(0.0), *pairs_at([0.0], [0]))
    assert found == pytest.approx(2 * negative)


def chosen_scores(flags: str) -> tuple[Tensor, Assignment]:
    predictions, targets = random_predictions(slots=30), [random_target(5), random_target(2)]
    matcher = soft_matcher(f"--soft_extra_layers 2 --scg_rho 0.2 {flags}")
    return found_by(matcher, request_of(predictions, targets)).kept, matcher([request_of(predictions, targets)])[0]


def test_the_strongest_pair_of_a_target_is_positive_and_extras_are_left_out_or_positive() -> None:
    kept, ignored = chosen_scores("--cls_target hard")
    counts = [int((ignored.score == value).sum()) for value in (1.0, -1.0)]
    assert counts == [2 * 7, int(kept.sum()) - 2 * 7] and counts[1] > 0
    _, positive = chosen_scores("--cls_target hard --extra_cls positive")
    assert (positive.score == 1).sum() == kept.sum()
    assert chosen_scores("")[1].score is None


def test_without_background_only_chosen_queries_of_images_with_objects_learn_classes() -> None:
    targets = [random_target(4), make_target()]
    for matcher in ("soft", "soft-literal"):
        criterion, predictions = soft_criterion("--no-soft_background", matcher), random_predictions(grad=True)
        found = found_by(criterion.assigners["queries"], request_of(predictions, targets))
        report = criterion(output_of(predictions), targets)
        criterion.weights = {name: float(name == "loss_ce") for name in criterion.weights}
        criterion(output_of(predictions), targets).total.backward()
        learns = predictions.logits.grad.abs().sum(-1) > 0
        assert torch.equal(learns[:, 0], found.kept.any(1).view(2, 2, -1)[:, 0])
        assert learns[:, 1].all() and torch.isfinite(report.total)


def test_pairs_of_weight_0_do_not_count_in_any_loss() -> None:
    pairs, assignment = pairs_at([1.0, 0.0], [1, 0])
    only, alone = pairs_at([1.0], [1])
    for term in (box_regression, focal_classification, soft_classification, pairwise_classification):
        for name, value in term(one_slot(0.4), pairs, assignment).items():
            torch.testing.assert_close(value, term(one_slot(0.4), only, alone)[name])
