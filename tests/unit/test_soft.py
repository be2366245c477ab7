"""The learned matcher on given predictions: shapes, invariances, pairs, schedules, health."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.assign import HungarianMatcher, scg, soft
from tests.tiny import make_target
from tests.unit.soft_cases import (
    CLASSES,
    WIDTH,
    dense,
    found_by,
    output_of,
    permuted,
    random_predictions,
    random_target,
    request_of,
    soft_criterion,
    soft_matcher,
)
from tests.waits import Waits
from util.structures import Predictions, Target

FORMS = {
    "soft": "",
    "rounds": "--scg rounds",
    "rowpeak": "--scg rowpeak",
    "mutual": "--scg mutual",
    "extras": "--soft_extra_layers 1 --cls_target hard",
    "rounds_extras": "--scg rounds --soft_extra_layers 1 --scg_rho 0.2",
    "no_background": "--no-soft_background --column_competition center",
    "sinkhorn": "--column_competition sinkhorn --soft_norm global --cls_target quality",
}


def targets_of(*counts: int) -> list[Target]:
    return [random_target(count, seed=i) for i, count in enumerate(counts)]


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (12, 1), (15, 2)], ids=str)
@pytest.mark.parametrize("matcher", ["soft", "soft-literal", "cost-greedy"])
def test_any_number_of_objects_gives_finite_losses_and_every_parameter_a_gradient(matcher: str, counts) -> None:
    criterion, predictions = soft_criterion(matcher=matcher), random_predictions(grad=True)
    report = criterion(output_of(predictions), targets_of(*counts), 0.0)
    report.total.backward()
    assert torch.isfinite(report.total)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())
    assert all(x.grad.isfinite().all() for x in (predictions.logits, predictions.boxes))


@pytest.mark.parametrize("flags", FORMS.values(), ids=FORMS.keys())
def test_flat_pairs_hold_all_weights_and_name_slots_of_the_stack(flags: str) -> None:
    stack, targets = random_predictions(layers=3, slots=20), targets_of(5, 3)
    matcher = soft_matcher(flags)
    request = replace(request_of(stack, targets), rows=[0, 2], layers=[0, 2], slots=slice(4, 18))
    found = found_by(matcher, request)
    (pairs,) = matcher([request])
    whole = dense(pairs, stack, 8)
    assert torch.equal(whole[[0, 2]][..., 4:18], found.weights.view(2, 2, 8, 14))
    assert not whole[1].any() and not whole[..., :4].any() and not whole[..., 18:].any()
    assert pairs.count == 8.0


@pytest.mark.parametrize("flags", FORMS.values(), ids=FORMS.keys())
def test_rows_of_weights_have_the_sum_1_or_0(flags: str) -> None:
    found = found_by(soft_matcher(flags), request_of(random_predictions(), targets_of(5, 2)))
    sums = found.weights.sum(2)
    if "global" not in flags:
        assert torch.where(sums > 0, sums - 1, 0.0).abs().max() < 1e-5
    assert (sums[~found.valid] == 0).all() and (found.c[~found.valid] == 0).all()
    if "rounds" in flags or "mutual" in flags:
        served = found.kept.sum(1)
        assert (served <= 1).all()
    if "rounds" in flags:
        assert (sums[found.valid] > 0).all()  # 8 rounds for at most 5 targets


def test_padding_changes_nothing() -> None:
    predictions, matcher = random_predictions(images=1), soft_matcher()
    alone = found_by(matcher, request_of(predictions, targets_of(5)))
    both = Predictions(
        predictions.logits.repeat(1, 2, 1, 1),
        predictions.boxes.repeat(1, 2, 1, 1),
        embeds=[x.repeat(2, 1, 1) for x in predictions.embeds],
    )
    padded = found_by(matcher, request_of(both, targets_of(5, 20)))
    assert (alone.valid.shape[1], padded.valid.shape[1]) == (8, 24)
    for name in ("c", "weights"):
        ours, theirs = getattr(alone, name)[:, :5], getattr(padded, name)[::2, :5]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("flags", FORMS.values(), ids=FORMS.keys())
def test_the_order_of_queries_and_of_objects_changes_only_the_order_of_weights(flags: str) -> None:
    predictions, target, matcher = random_predictions(images=1), random_target(5), soft_matcher(flags)
    first = found_by(matcher, request_of(predictions, [target])).weights
    queries, objects = torch.randperm(12), torch.randperm(5)
    moved = found_by(matcher, request_of(permuted(predictions, queries), [target])).weights
    torch.testing.assert_close(moved, first[..., queries], atol=1e-5, rtol=0)
    other = replace(target, labels=target.labels[objects], boxes=target.boxes[objects])
    moved = found_by(matcher, request_of(predictions, [other])).weights
    torch.testing.assert_close(moved[:, :5], first[:, objects], atol=1e-5, rtol=0)


def test_everything_is_float32_under_autocast() -> None:
    predictions, targets, matcher = random_predictions(), targets_of(3, 1), soft_matcher()
    (plain,) = matcher([request_of(predictions, targets)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = matcher([request_of(predictions, targets)])
    assert found.weight.dtype == found.losses["loss_corr"].dtype == torch.float32
    assert torch.equal(found.weight, plain.weight)


@pytest.mark.parametrize(
    ("matcher", "flags"), [("soft-literal", ""), ("cost-greedy", ""), *(("soft", flags) for flags in FORMS.values())]
)
def test_a_training_step_waits_for_nothing(matcher: str, flags: str) -> None:
    criterion, predictions = soft_criterion(flags, matcher), random_predictions(grad=True)
    output, targets = output_of(predictions), targets_of(5, 2)
    with Waits() as waits:
        criterion(output, targets, 0.0).total.backward()
    assert not waits.found


def test_one_to_many_gives_a_target_at_most_k_queries_and_its_first_one_by_rounds() -> None:
    predictions, targets = random_predictions(slots=30), targets_of(4, 2)
    matcher = soft_matcher("--scg_rho 0.01")
    many = found_by(matcher, request_of(predictions, targets, repeat=3))
    rounds = found_by(soft_matcher("--scg rounds"), request_of(predictions, targets))
    assert many.kept.sum(2).max() == 3 and (many.kept.sum(1) <= 1).all()
    assert (many.kept & rounds.kept).sum() == rounds.kept.sum()
    (pairs,) = matcher([request_of(predictions, targets, repeat=3)])
    assert pairs.count == 18.0  # the weights of a target have the sum 3, however many queries it has
    assert torch.equal(dense(pairs, predictions, 8), many.weights.view(2, 2, 8, 30))


def test_isolated_blocks_have_correspondences_of_their_own() -> None:
    predictions, targets, matcher = random_predictions(slots=12), targets_of(3, 2), soft_matcher()
    (pairs,) = matcher([request_of(predictions, targets, block=4)])
    weights = dense(pairs, predictions, 8)
    for start in (0, 4, 8):
        request = replace(request_of(predictions, targets), slots=slice(start, start + 4))
        own = found_by(matcher, request).weights.view(2, 2, 8, 4)
        assert torch.equal(weights[..., start : start + 4], own)


def test_in_a_crowd_a_target_keeps_its_strongest_pairs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, targets = random_predictions(), targets_of(7, 6)
    matcher, request = soft_matcher("--scg_rho 0.01"), request_of(predictions, targets)
    assert found_by(matcher, request).kept.sum(2).max() > 2
    monkeypatch.setattr(soft, "MOST", 2)
    found = found_by(matcher, request)
    assert found.kept.sum(2).max() == 2
    assert torch.equal(dense(matcher([request])[0], predictions, 8), found.weights.view(2, 2, 8, 12))


@pytest.mark.parametrize("competition", ["none", "dual", "center", "sinkhorn"])
def test_empty_slots_are_never_chosen(competition: str) -> None:
    predictions, targets = random_predictions(), targets_of(5, 2)
    predictions.padding = torch.arange(12).expand(2, -1) >= 6
    for matcher, flags in (("soft", f"--column_competition {competition}"), ("cost-greedy", "")):
        (pairs,) = soft_criterion(flags, matcher).assigners["queries"]([request_of(predictions, targets)])
        assert dense(pairs, predictions, 8)[..., 6:].sum() == 0
        assert dense(pairs, predictions, 8)[..., :6].sum() > 0


def test_proposals_are_probed_without_class_among_the_best_ones_only() -> None:
    predictions, matcher = random_predictions(layers=1, slots=40), soft_matcher("--two_stage --with_box_refine")
    target = random_target(3)
    classless = replace(target, labels=torch.zeros_like(target.labels))
    (pairs,) = matcher([request_of(predictions, [classless] * 2, class_agnostic=True)])
    best = predictions.logits[0, ..., 0].topk(matcher.proposals).indices
    chosen = dense(pairs, predictions, 8)[0].sum(1) > 0
    assert chosen.any() and not chosen.scatter(1, best, False).any()
    assert matcher.proposals == 8
    with torch.no_grad():
        matcher.probe.target_class.weight.add_(1.0)
    (same,) = matcher([request_of(predictions, [classless] * 2, class_agnostic=True)])
    assert torch.equal(pairs.weight, same.weight)


def test_predictions_without_embeddings_are_refused() -> None:
    predictions = replace(random_predictions(), embeds=None)
    with pytest.raises(ValueError, match="set one2one: a learned matcher looks at embeddings"):
        soft_matcher()([request_of(predictions, targets_of(1, 1))])


# schedules


def test_the_prior_fades_over_the_first_tenth_of_training() -> None:
    predictions, targets = random_predictions(), targets_of(5, 2)
    matcher = soft_matcher("--epochs 20")
    geometry = found_by(matcher, request_of(predictions, targets)).costs.geometry

    def logits(time: float | None) -> torch.Tensor:
        seen = []
        compete = scg.compete
        scg.compete = lambda z, *rest: seen.append(z) or compete(z, *rest)
        try:
            matcher.correspond(request_of(predictions, targets, time))
        finally:
            scg.compete = compete
        return seen[0]

    for time, weight in ((0.0, 1.0), (0.5, 0.75), (2.0, 0.0), (None, 0.0)):
        torch.testing.assert_close(logits(time), logits(19.0) - weight * geometry)


def test_the_choice_changes_to_rounds_at_its_share_of_training() -> None:
    predictions, targets = random_predictions(), targets_of(5, 2)
    switching = soft_matcher("--epochs 10 --scg_switch 0.7 --soft_warmup none")
    plain, rounds = soft_matcher("--soft_warmup none"), soft_matcher("--scg rounds --soft_warmup none")
    for time, same in ((6.9, plain), (7.0, rounds), (None, rounds)):
        found = found_by(switching, request_of(predictions, targets, time))
        assert torch.equal(found.kept, found_by(same, request_of(predictions, targets, time)).kept)
    assert not torch.equal(found.kept, found_by(plain, request_of(predictions, targets)).kept)


def test_the_teacher_helps_towards_optimal_pairs_until_the_end_of_the_warm_up() -> None:
    predictions, targets = random_predictions(), targets_of(3, 1)
    matcher = soft_matcher("--soft_warmup teacher --epochs 10")
    found = matcher.correspond(request_of(predictions, targets, 0.5))
    (pairs,) = HungarianMatcher()([request_of(predictions, targets)])
    cross_entropy = -found.log_c[pairs.layer * 2 + pairs.image, pairs.target, pairs.slot]
    expected = 0.5 * torch.stack([cross_entropy[pairs.layer == layer].sum() for layer in (0, 1)])
    (taught,) = matcher([request_of(predictions, targets, 0.5)])
    torch.testing.assert_close(taught.losses["loss_teacher"], expected)
    (later,) = matcher([request_of(predictions, targets, 1.0)])
    assert "loss_teacher" not in later.losses


def test_undecided_correspondences_are_rewarded_at_first() -> None:
    predictions, targets = random_predictions(), targets_of(3, 1)
    options = "--probe_entropy 0.5 --epochs 10 --soft_warmup none"
    now, later = (soft_matcher(options)([request_of(predictions, targets, t)])[0] for t in (0.0, 2.0))
    found = found_by(soft_matcher(options), request_of(predictions, targets, 2.0))
    entropy = torch.special.entr(found.c).sum(2) / torch.tensor(12.0).log()
    expected = 0.5 * entropy.view(2, -1).sum(1)
    torch.testing.assert_close(later.losses["loss_corr"] - now.losses["loss_corr"], expected)


# health


def test_health_of_a_choice_by_hand() -> None:
    predictions = random_predictions(layers=1, images=1, slots=4)
    matcher, target = soft_matcher(), random_target(3)
    found = matcher.correspond(request_of(predictions, [target]))
    c = torch.zeros(1, 8, 4)
    c[0, :3] = torch.tensor([[0.50, 0.40, 0.06, 0.04], [0.30, 0.62, 0.05, 0.03], [0.24, 0.30, 0.24, 0.22]])
    found.c = c
    matcher.choose(found)
    logs = matcher._logs(found)
    expected = {"distinct": 2 / 3, "unassigned": 1 / 3, "c_max": (0.50 + 0.62 + 0.30) / 3, "pos_per_gt": 4 / 3}
    for name, value in expected.items():
        assert logs[name].item() == pytest.approx(value), name


def test_detections_beyond_the_first_of_an_object_are_duplicates() -> None:
    same, other = [0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]
    boxes = torch.tensor([[[same, same, same, other, same]]])
    logits = torch.full((1, 1, 5, CLASSES), -9.0)
    logits[..., :4, 1] = 2.0  # the last slot does not speak
    predictions = Predictions(logits, boxes, embeds=[torch.randn(1, 5, WIDTH)])
    for matcher in ("soft", "cost-greedy"):
        (found,) = soft_criterion(matcher=matcher).assigners["queries"](
            [request_of(predictions, [make_target([same, other], [1, 1])])]
        )
        assert found.logs["dup"].item() == pytest.approx(2 / 2)


def test_agreement_and_regret_are_told_in_evaluation_only() -> None:
    criterion, predictions, targets = soft_criterion(), random_predictions(), targets_of(5, 3)
    assert "agree" not in criterion(output_of(predictions), targets).terms
    criterion.eval()
    for some in (targets, targets_of(4, 0)):
        terms = criterion(output_of(predictions), some).terms
        assert 0 <= terms["agree"] <= 1 and terms["regret"] > 0
    greedy = soft_criterion(matcher="cost-greedy").eval()
    apart = make_target([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]], [0, 1])
    easy = random_predictions(layers=1, images=1, slots=2)
    easy.boxes[0, 0] = apart.boxes[[1, 0]]
    terms = greedy(output_of(easy), [apart]).terms
    assert terms["agree"] == 1 and terms["regret"].abs() < 1e-5
