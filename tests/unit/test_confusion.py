"""Thresholds and confusion matrix: counted by hand first, then against COCO's own evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from datasets.base import silent_coco
from datasets.confusion import class_points, common_threshold, confusion, image_scores
from datasets.evaluators import CocoEvaluator
from datasets.matches import match_all
from tests.unit.eval_cases import drawn, feed

CAT, DOG = 3, 7
HERE, FAR = (10, 10, 10, 10), (60, 60, 10, 10)
NEAR = (10, 10, 10, 8)  # IoU 0.8 with HERE
WIDE = (10, 10, 10, 19)  # IoU 10 / 19 with HERE
OUT = (10, 10, 10, 21)  # IoU 10 / 21 with HERE


def truth(*objects: tuple, images: int = 1) -> SimpleNamespace:
    """An object is (image id, category, box[, crowd]); images are 1, 2, ...; there is an unused label between."""
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": list(box), "area": 100.0, "iscrowd": int(any(c))}
        for i, (image, category, box, *c) in enumerate(objects, start=1)
    ]
    ids = list(range(1, images + 1))
    categories = [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}]
    coco = silent_coco({"images": [{"id": i} for i in ids], "categories": categories, "annotations": annotations})
    return SimpleNamespace(coco=coco, image_ids=ids, category_ids=[CAT, -1, DOG], class_names=["cat", "N/A", "dog"])


def matched(dataset: SimpleNamespace, *found: tuple):
    """A detection is (image id, category, box, score), of an image the best first."""
    rows = {i: [(*box, score, c) for image, c, box, score in found if image == i] for i in dataset.image_ids}
    return match_all(dataset, {i: np.asarray(own, dtype=float) for i, own in rows.items() if own})


def counts(matches, threshold: float = 0.1) -> list[list[int]]:
    return confusion(matches, threshold).counts.tolist()


def test_a_right_a_wrong_and_a_missed_object_stand_in_their_cells():
    objects = [(1, CAT, HERE), (1, CAT, FAR), (2, DOG, HERE), (2, DOG, FAR)]
    found = [(1, CAT, HERE, 0.9), (1, DOG, FAR, 0.8), (2, DOG, NEAR, 0.7), (2, CAT, (80, 10, 5, 5), 0.6)]
    #                                    cat dog missed
    assert counts(matched(truth(*objects, images=2), *found)) == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_an_object_is_found_once_and_by_the_best_detection_of_its_class():
    matches = matched(truth((1, CAT, HERE)), (1, CAT, NEAR, 0.9), (1, CAT, HERE, 0.8))
    assert matches.object_of.tolist() == [0, -1]
    assert counts(matches) == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_a_better_detection_of_another_class_does_not_take_an_object_away():
    matches = matched(truth((1, CAT, HERE)), (1, DOG, HERE, 0.9), (1, CAT, HERE, 0.8))
    assert counts(matches) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_a_detection_takes_the_free_object_that_it_overlaps_most():
    matches = matched(truth((1, CAT, WIDE), (1, CAT, NEAR)), (1, CAT, HERE, 0.9), (1, CAT, HERE, 0.8))
    assert matches.object_of.tolist() == [1, 0]


@pytest.mark.parametrize(("box", "found"), [(WIDE, 1), (OUT, 0)])
def test_an_overlap_of_half_is_needed(box, found):
    assert counts(matched(truth((1, CAT, HERE)), (1, CAT, box, 0.9)))[0] == [found, 0, 1 - found]


def test_detections_below_the_threshold_are_not_there():
    matches = matched(truth((1, CAT, HERE)), (1, CAT, HERE, 0.5))
    assert counts(matches, 0.5)[0] == [1, 0, 0]
    assert counts(matches, 0.51)[0] == [0, 0, 1]


def test_crowd_regions_are_no_objects_and_detections_in_them_do_not_count():
    dataset = truth((1, CAT, (0, 0, 40, 40), True), (1, DOG, FAR))
    matches = matched(dataset, (1, CAT, (5, 5, 10, 10), 0.9), (1, CAT, (8, 8, 10, 10), 0.8), (1, DOG, HERE, 0.7))
    assert matches.ignored.tolist() == [True, True, False]
    assert counts(matches) == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_rows_add_up_to_the_objects_and_columns_to_the_detections():
    dataset, batch = drawn(3, crowd=0.2, digits=2)
    matches = match_all(dataset, feed(CocoEvaluator(dataset, implementation="pycocotools"), batch).rows)
    table = confusion(matches, 0.4).counts
    assert table[:-1].sum(axis=1).tolist() == matches.per_class.tolist()
    shown = (matches.found.score >= 0.4) & ~matches.ignored
    assert table[:, :-1].sum(axis=0).tolist() == np.bincount(matches.found.label[shown], minlength=3).tolist()
    assert table[-1, -1] == 0


def test_wrong_classes_are_listed_the_most_frequent_first():
    objects = [(1, DOG, HERE), (1, CAT, FAR), (2, CAT, HERE), (2, CAT, FAR)]
    found = [(1, CAT, HERE, 0.9), (1, DOG, FAR, 0.8), (2, DOG, HERE, 0.7), (2, CAT, FAR, 0.6)]
    listed = confusion(matched(truth(*objects, images=2), *found), 0.1).mistaken()
    assert listed == [("cat", "dog", 2, pytest.approx(2 / 3)), ("dog", "cat", 1, 1.0)]


def three_of_four():
    """Scores 0.9 right, 0.8 wrong, 0.7 right, 0.6 right, 0.5 wrong; four objects."""
    boxes = [(20 * i, 0, 10, 10) for i in range(4)]
    found = [(1, CAT, boxes[0], 0.9), (1, CAT, FAR, 0.8), (1, CAT, boxes[1], 0.7), (1, CAT, boxes[2], 0.6)]
    return matched(truth(*((1, CAT, box) for box in boxes)), *found, (1, CAT, HERE, 0.5))


def test_the_threshold_of_a_class_has_the_best_f1():
    cat, dog = class_points(three_of_four(), common=0.85)
    # F1 is 2 right / (found + 4): 2/5, 2/6, 4/7, 6/8, 6/9
    assert (cat.objects, cat.threshold, cat.precision, cat.recall, cat.F1) == (4, 0.6, 0.75, 0.75, 0.75)
    assert (cat.common_threshold, cat.common_precision, cat.common_recall, cat.common_F1) == (0.85, 1.0, 0.25, 0.4)
    assert dog[2:] == (0, -1.0, -1.0, -1.0, -1.0, 0.85, -1.0, -1.0, -1.0)


def test_equal_scores_pass_a_threshold_together():
    boxes = [HERE, FAR]
    matches = matched(truth((1, CAT, HERE)), *((1, CAT, box, 0.5) for box in boxes))
    assert class_points(matches, 0.5)[0][3:7] == (0.5, 0.5, 1.0, pytest.approx(2 / 3))


def test_a_class_that_nothing_finds_has_rates_of_zero_and_no_threshold():
    assert class_points(matched(truth((1, CAT, HERE)), (1, CAT, FAR, 0.5)), 0.3)[0][3:7] == (-1.0, 0.0, 0.0, 0.0)


def test_the_common_threshold_is_the_lowest_of_the_best_mean_f1():
    assert common_threshold(three_of_four()) == 0.51  # above 0.5, from there to 0.6 all the same
    assert common_threshold(matched(truth((1, CAT, HERE)), (1, CAT, HERE, 0.29), (1, CAT, FAR, 0.28))) == 0.29
    assert common_threshold(matched(truth())) == 0.5
    assert common_threshold(matched(truth((1, CAT, HERE)), (1, CAT, FAR, 0.9))) == 0.5  # nothing is right


def test_images_are_scored_one_by_one():
    objects = [(1, CAT, HERE), (1, DOG, FAR), (2, CAT, HERE), (4, CAT, (0, 0, 50, 50), True)]
    found = [(1, CAT, HERE, 0.9), (2, DOG, HERE, 0.8), (4, CAT, HERE, 0.7), (5, CAT, HERE, 0.6), (5, CAT, FAR, 0.1)]
    f1, count, mistakes = image_scores(matched(truth(*objects, images=5), *found), 0.5, 5)
    assert f1.tolist() == [pytest.approx(2 / 3), 0.0, 1.0, 1.0, 0.0]
    assert count.tolist() == [2, 1, 0, 0, 0]
    assert mistakes.tolist() == [1, 2, 0, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_matches_give_the_curve_of_pycocotools(seed):
    """COCO's precision at a recall, rebuilt from the matches, is the array of the evaluation."""
    dataset, batch = drawn(seed, crowd=0.2, digits=2)
    evaluator = feed(CocoEvaluator(dataset, implementation="pycocotools"), batch)
    matches = match_all(dataset, evaluator.rows)
    for k, category in enumerate(matches.category_ids):
        own = np.flatnonzero((matches.found.label == k) & ~matches.ignored)
        own = own[np.argsort(-matches.found.score[own], kind="stable")]
        # Images of equal score come in the order of their ids in both.
        right = np.cumsum(matches.hit[own])
        precision = right / np.arange(1, len(own) + 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(right / matches.per_class[k], np.linspace(0, 1, 101), side="left")
        expected = [best_from_here[i] if i < len(own) else 0.0 for i in at]
        done = evaluator.evaluated()
        stored = done.precision[0, :, done.category_ids.index(category), 0, -1]
        np.testing.assert_allclose(stored, expected, rtol=0, atol=1e-12)


def test_labels_that_no_category_uses_have_no_row():
    dataset, batch = drawn(0)
    rows = feed(CocoEvaluator(dataset, implementation="pycocotools"), batch).rows
    dataset.category_ids, dataset.class_names = [-1, 3, -1, 7, 11], ["N/A", "a", "N/A", "b", "c"]
    assert confusion(match_all(dataset, rows), 0.5).names == ["a", "b", "c"]
