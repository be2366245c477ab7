"""Hungarian matching: costs by hand, repeats, empty images, one copy to the host."""

from __future__ import annotations

import math

import pytest
import torch

from models.assign import HungarianMatcher, Request
from models.assign.costs import class_cost, giou_cost, l1_cost
from tests.tiny import make_target
from util.structures import FlatTargets, Predictions, Supervision


def predictions_at(boxes: list[list[float]], layers: int = 1, classes: int = 3) -> Predictions:
    stacked = torch.tensor(boxes).expand(layers, 1, -1, -1)
    return Predictions(torch.zeros(layers, 1, len(boxes), classes), stacked)


def match(predictions: Predictions, targets: list, **supervision):
    request = Request("one2one", predictions, FlatTargets.of(targets), Supervision(**supervision))
    (found,) = HungarianMatcher()([request])
    return found


def test_class_cost_of_an_even_score_is_the_focal_difference_by_hand() -> None:
    # p = 0.5: 0.25 * 0.25 * log 2 - 0.75 * 0.25 * log 2
    expected = (0.25 - 0.75) * 0.25 * math.log(2)
    found = class_cost(torch.zeros(1))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_l1_cost_adds_the_four_distances() -> None:
    found = l1_cost(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.4, 0.7, 0.1, 0.5]]))
    assert found.item() == pytest.approx(0.1 + 0.2 + 0.1 + 0.3)


def test_giou_cost_of_two_boxes_side_by_side_is_the_empty_share_of_the_hull() -> None:
    # Two unit squares with a unit gap: IoU 0, hull 3, union 2, so GIoU = -(3 - 2) / 3.
    found = giou_cost(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))
    assert found.item() == pytest.approx(1 / 3)


def test_each_target_gets_the_nearest_slot() -> None:
    boxes = [[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]
    found = match(predictions_at(boxes), [make_target([boxes[2], boxes[0]], [0, 0])])
    assert list(zip(found.slot.tolist(), found.target.tolist())) == [(0, 1), (2, 0)]


def test_every_layer_is_matched_on_its_own() -> None:
    boxes = torch.tensor(
        [[[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]], [[[0.8, 0.8, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]]]]
    )
    found = match(Predictions(torch.zeros(2, 1, 2, 3), boxes), [make_target([[0.2, 0.2, 0.1, 0.1]], [0])])
    assert found.layer.tolist() == [0, 1]
    assert found.slot.tolist() == [0, 1]


def test_a_repeated_target_is_matched_k_times_to_different_slots() -> None:
    boxes = [[0.1 * i, 0.5, 0.1, 0.1] for i in range(1, 8)]
    found = match(predictions_at(boxes), [make_target([boxes[0], boxes[6]], [0, 1])], repeat=3)
    assert found.target.bincount().tolist() == [3, 3]
    assert len(set(found.slot.tolist())) == 6
    assert found.count == 6


def test_more_repeats_than_slots_match_every_slot_once_and_count_all_repeats() -> None:
    boxes = [[0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]]
    found = match(predictions_at(boxes), [make_target([boxes[0], boxes[1]], [0, 1])], repeat=6)
    assert sorted(found.slot.tolist()) == [0, 1]
    assert found.count == 12


def test_an_image_without_objects_gets_no_pair() -> None:
    found = match(predictions_at([[0.5, 0.5, 0.1, 0.1]], layers=3), [make_target()])
    assert len(found) == 0
    assert found.count == 0


def test_positives_are_counted_per_layer_where_the_supervision_says_so() -> None:
    boxes = [[0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]]
    found = match(predictions_at(boxes, layers=2), [make_target([boxes[0]] * 3, [0, 1, 2])], count="positives")
    assert found.count == 2


def test_a_non_finite_prediction_is_matched_all_the_same_and_named() -> None:
    predictions = predictions_at([[0.5, 0.5, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1]])
    predictions.boxes = predictions.boxes.clone()
    predictions.boxes[0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="set one2one, layer 0, image id 42"):
        found = match(predictions, [make_target([[0.5, 0.5, 0.1, 0.1]], [0], image_id=42)])
    assert found.slot.tolist() == [1]


def test_all_sets_and_layers_are_copied_to_the_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = torch.Tensor.cpu

    def counting(tensor, *args, **kwargs):
        copies.append(tensor.shape)
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    boxes = [[0.2, 0.5, 0.1, 0.1], [0.8, 0.5, 0.1, 0.1]]
    target = FlatTargets.of([make_target([boxes[0]], [0])])
    requests = [Request(str(i), predictions_at(boxes, layers=6), target, Supervision()) for i in range(3)]
    HungarianMatcher()(requests)
    assert len(copies) == 1


def test_a_matcher_without_any_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="all matching costs are 0"):
        HungarianMatcher(cost_class=0, cost_bbox=0, cost_giou=0)
