"""Score thresholds and the confusion matrix of an evaluation, counted from `datasets.matches`.

Everything here is at IoU 0.5. Crowd regions are no objects, and detections inside them do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datasets.matches import IOU, Matches, assign

STEPS = 100  # common thresholds tried: 0.01, 0.02, ..., 1.00


class ClassPoint(NamedTuple):
    """One class at the threshold of its best F1, and at the threshold that all classes share.

    F1 is the harmonic mean of precision and recall. All are -1 for a class without objects; the threshold is -1 too
    where no detection is right.
    """

    category_id: int
    name: str
    objects: int
    threshold: float
    precision: float
    recall: float
    F1: float
    common_threshold: float
    common_precision: float
    common_recall: float
    common_F1: float


@dataclass(frozen=True)
class Confusion:
    """What became of every object and every detection with at least the score `threshold`."""

    names: list[str]  # of the K classes
    counts: np.ndarray  # (K + 1, K + 1) int64; rows: truth, last: background; columns: predicted, last: missed
    threshold: float

    def mistaken(self) -> list[tuple[str, str, int, float]]:
        """Return (truth, predicted, count, share of the objects of that class) of wrong classes, the most first."""
        wrong = self.counts[:-1, :-1].copy()
        np.fill_diagonal(wrong, 0)
        objects = self.counts[:-1].sum(axis=1)
        truth, predicted = np.nonzero(wrong)
        counts = wrong[truth, predicted]
        shares = counts / objects[truth]
        order = np.lexsort((predicted, truth, -shares, -counts))
        columns = (column[order].tolist() for column in (truth, predicted, counts, shares))
        return [(self.names[t], self.names[p], count, share) for t, p, count, share in zip(*columns)]


def class_points(matches: Matches, common: float) -> list[ClassPoint]:
    """Return one row per class: its best threshold, and how it does at `common`."""
    counted = ~matches.ignored
    label, score, hit = matches.found.label[counted], matches.found.score[counted], matches.hit[counted]
    order = np.lexsort((-score, label))
    ends = np.searchsorted(label[order], np.arange(len(matches.names) + 1))
    points = []
    for k, objects in enumerate(matches.per_class.tolist()):
        own = order[ends[k] : ends[k + 1]]
        best = _best(score[own], hit[own], objects)
        kept = own[score[own] >= common]
        shared = _rates(int(hit[kept].sum()), len(kept), objects)
        points.append(ClassPoint(matches.category_ids[k], matches.names[k], objects, *best, common, *shared))
    return points


def _best(score: np.ndarray, hit: np.ndarray, objects: int) -> tuple[float, float, float, float]:
    """Return (threshold, precision, recall, F1) of the best F1; of equal ones, that of the highest threshold."""
    if objects == 0 or not hit.any():
        return -1.0, *_rates(0, 0, objects)
    last = np.append(score[1:] != score[:-1], True)  # equal scores pass a threshold together
    right, all_found = np.cumsum(hit)[last], np.flatnonzero(last) + 1
    i = int(np.argmax(2 * right / (all_found + objects)))
    return float(score[last][i]), *_rates(int(right[i]), int(all_found[i]), objects)


def _rates(right: int, found: int, objects: int) -> tuple[float, float, float]:
    """Return precision, recall and F1; the precision of no detection is 0."""
    if objects == 0:
        return -1.0, -1.0, -1.0
    return right / max(found, 1), right / objects, 2 * right / (found + objects)


def common_threshold(matches: Matches) -> float:
    """Return the score, in steps of 0.01, from which on the mean F1 over classes with objects is best.

    Of equal ones it is the lowest; 0.5 where no detection is right.
    """
    counted, classes = ~matches.ignored, len(matches.names)
    # Threshold t keeps scores >= t / STEPS; the small number mends 0.29 * 100 = 28.999...
    step = np.floor(matches.found.score[counted] * STEPS + 1e-9).astype(np.int64).clip(0, STEPS)
    cell = matches.found.label[counted] * (STEPS + 1) + step
    size = classes * (STEPS + 1)
    tables = (np.bincount(cells, minlength=size) for cells in (cell, cell[matches.hit[counted]]))
    found, right = (t.reshape(classes, -1)[:, ::-1].cumsum(axis=1)[:, ::-1] for t in tables)
    objects = matches.per_class[:, None]
    if not right.any():
        return 0.5
    f1 = (2 * right / np.maximum(found + objects, 1))[matches.per_class > 0].mean(axis=0)
    return (1 + int(np.argmax(f1[1:]))) / STEPS


def confusion(matches: Matches, threshold: float) -> Confusion:
    """Count what became of objects and detections.

    First come the pairs of equal class, those of the evaluation: the diagonal. Then the detections that are left take,
    in the order of their scores, the free object that they overlap most, whatever its class. What is left after that
    is a detection of background (also a second one of an object that was found) or a missed object.
    """
    classes = len(matches.names)
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    shown = (matches.found.score >= threshold) & ~matches.ignored
    hit = shown & matches.hit
    free = ~matches.objects.crowd
    free[matches.object_of[hit]] = False
    np.add.at(counts, (matches.found.label[hit],) * 2, 1)

    found, objects = matches.found[shown & ~hit], matches.objects[free]
    taken = assign(found, objects, IOU, same_class=False)
    wrong = taken >= 0
    missed = np.ones(len(objects), dtype=bool)
    missed[taken[wrong]] = False
    np.add.at(counts, (objects.label[taken[wrong]], found.label[wrong]), 1)
    np.add.at(counts, (classes, found.label[~wrong]), 1)
    np.add.at(counts, (objects.label[missed], classes), 1)
    return Confusion(matches.names, counts, threshold)


def image_scores(matches: Matches, threshold: float, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (images,) F1, objects and mistakes (missed objects and wrong detections) of each image.

    F1 is 1 where there is neither object nor detection: nothing could be done better.
    """
    shown = (matches.found.score >= threshold) & ~matches.ignored
    right = np.bincount(matches.found.image[shown & matches.hit], minlength=images)
    found = np.bincount(matches.found.image[shown], minlength=images)
    objects = np.bincount(matches.objects.image[~matches.objects.crowd], minlength=images)
    both = found + objects
    return np.where(both > 0, 2 * right / np.maximum(both, 1), 1.0), objects, both - 2 * right
