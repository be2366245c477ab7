"""Matching by cost in rounds: the pairs, repeats, blocks, and that training with it needs no solver."""

from __future__ import annotations

import pytest
import torch

from models.assign import HungarianMatcher, hungarian
from tests.tiny import make_target
from tests.unit.soft_cases import dense, output_of, random_predictions, random_target, request_of, soft_criterion


def greedy(flags: str = ""):
    return soft_criterion(flags, "cost-greedy").assigners["queries"]


def test_the_cheapest_bid_wins_and_the_loser_takes_its_next_best_slot() -> None:
    predictions = random_predictions(layers=1, images=1, slots=3)
    predictions.logits.zero_()
    predictions.boxes[0, 0] = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.6, 0.5, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1]])
    near, nearer = [0.52, 0.5, 0.2, 0.2], [0.51, 0.5, 0.2, 0.2]
    (found,) = greedy()([request_of(predictions, [make_target([near, nearer], [0, 0])])])
    assert dict(zip(found.target.tolist(), found.slot.tolist())) == {0: 1, 1: 0}
    assert found.weight.tolist() == [1, 1] and found.count == 2
    (found,) = greedy("--greedy_rounds 1")([request_of(predictions, [make_target([near, nearer], [0, 0])])])
    assert found.weight.tolist() == [0, 1]
    assert found.logs["unassigned"] == 0.5


def test_it_agrees_with_the_solver_where_every_object_has_a_slot_of_its_own() -> None:
    centres = torch.tensor([0.15, 0.4, 0.65, 0.9])
    predictions = random_predictions(layers=2, images=1, slots=4)
    predictions.boxes[:] = torch.stack([centres, centres, *[torch.full((4,), 0.1)] * 2], -1)
    target = make_target((predictions.boxes[0, 0, [2, 0]] + 0.01).tolist(), [1, 3])
    request = request_of(predictions, [target])
    (ours,), (theirs,) = greedy()([request]), HungarianMatcher()([request])
    keys = [sorted(zip(a.layer.tolist(), a.slot.tolist(), a.target.tolist())) for a in (ours, theirs)]
    assert keys[0] == keys[1]


def test_a_repeated_target_gets_k_different_slots() -> None:
    predictions, targets = random_predictions(slots=20), [random_target(4), random_target(2)]
    (found,) = greedy()([request_of(predictions, targets, repeat=3)])
    weights = dense(found, predictions, 4)
    assert weights.max() == 1 and weights.sum(2).max() == 1
    assert weights.sum(3).tolist() == [[[3, 3, 3, 3], [3, 3, 0, 0]]] * 2
    assert found.count == 18


def test_isolated_blocks_match_every_target_once_each() -> None:
    predictions, targets = random_predictions(slots=12), [random_target(3), random_target(1)]
    (found,) = greedy()([request_of(predictions, targets, block=4)])
    weights = dense(found, predictions, 3)
    assert weights.view(2, 2, 3, 3, 4).sum(4)[:, 0].eq(1).all()
    assert found.count == 4


def test_more_objects_than_slots_leave_the_surplus_without_one() -> None:
    predictions, targets = random_predictions(layers=1, images=1, slots=5), [random_target(9)]
    (found,) = greedy("--greedy_rounds 9")([request_of(predictions, targets, count="positives")])
    assert found.weight.sum() == 5 and found.count == 5
    assert found.logs["unassigned"].item() == pytest.approx(4 / 9)


def test_no_solver_runs_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*problems):
        raise AssertionError("the solver was asked")

    monkeypatch.setattr(hungarian, "solve", refuse)
    monkeypatch.setattr(hungarian, "linear_sum_assignment", refuse)
    targets = [random_target(4), random_target(2)]
    for matcher in ("cost-greedy", "soft", "soft-literal"):
        criterion = soft_criterion("--two_stage --with_box_refine", matcher)
        criterion(output_of(random_predictions()), targets, 0.0)
        criterion(output_of(random_predictions(), assign="proposals", class_agnostic=True), targets, 0.0)
        with pytest.raises(AssertionError, match="the solver was asked"):
            criterion.eval()(output_of(random_predictions()), targets)
