"""Precision-recall curves, score thresholds and the confusion matrix of an evaluation: tables and pictures in `eval/`.

`precision_recall.csv` and `pr_curves.png` come from the arrays of the evaluation, so every package gives the same;
`thresholds.csv`, `confusion.csv`, `confusions.csv` and `confusion.png` from our own matches at IoU 0.5.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.confusion import ClassPoint, Confusion, class_points, common_threshold, confusion
from datasets.eval_backends import Evaluated
from datasets.evaluators import CocoEvaluator
from datasets.matches import Matches, match_all
from util.errors import UserError

RECALL = np.linspace(0, 1, 101)  # the recall steps of COCO's evaluation
IOU_50, IOU_75 = 0, 5  # places of IoU 0.5 and 0.75 among 0.5, 0.55, ..., 0.95


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision at the 101 recall steps: COCO's, the best precision at this recall or a higher one.

    Means are over the classes that have objects. AP50, AP75 and AP are the means over the steps of `at_50`, `at_75`
    and `mean`.
    """

    at_50: np.ndarray  # (101,) mean over classes at IoU 0.5
    at_75: np.ndarray  # (101,)
    mean: np.ndarray  # (101,) mean over the IoUs 0.5 to 0.95 too
    classes: dict[str, np.ndarray]  # (101,) at IoU 0.5 of every class that has objects, by its name


@dataclass(frozen=True)
class EvalCurves:
    """All that is drawn of an evaluation."""

    precision_recall: PrecisionRecall
    points: list[ClassPoint]
    confusion: Confusion
    matches: Matches | None  # not in the files


def precision_recall(done: Evaluated, category_ids: Sequence[int], names: Sequence[str]) -> PrecisionRecall:
    """Return the curves of an evaluation, all object sizes, 100 detections per image.

    Args:
        category_ids, names: of the classes that are shown, in this order.
    """
    precision = done.precision[:, :, :, 0, -1]  # (10, 101, K)
    columns = {i: precision[:, :, k] for k, i in enumerate(done.category_ids)}
    shown = {name: columns[i] for i, name in zip(category_ids, names) if columns[i].max() > -1}
    if not shown:
        nothing = np.full(len(RECALL), np.nan)
        return PrecisionRecall(nothing, nothing, nothing, {})
    every = np.stack(list(shown.values()), axis=-1)
    return PrecisionRecall(
        at_50=every[IOU_50].mean(axis=-1),
        at_75=every[IOU_75].mean(axis=-1),
        mean=every.mean(axis=(0, 2)),
        classes={name: column[IOU_50] for name, column in shown.items()},
    )


def eval_curves(evaluator: CocoEvaluator, score: float | None = None) -> EvalCurves:
    """Return the curves of the detections that the evaluator has.

    Args:
        score: threshold of the confusion matrix; None: the one of the best mean F1.
    """
    matches = match_all(evaluator.dataset, evaluator.rows)
    score = common_threshold(matches) if score is None else score
    return EvalCurves(
        precision_recall(evaluator.evaluated(), matches.category_ids, _unique(matches)),
        class_points(matches, score),
        confusion(matches, score),
        matches,
    )


def _unique(matches: Matches) -> list[str]:
    """Return the class names, with the category id where two classes share a name."""
    pairs = zip(matches.names, matches.category_ids)
    return [name if matches.names.count(name) == 1 else f"{name} ({i})" for name, i in pairs]


def write_eval_curves(curves: EvalCurves, folder: Path) -> str:
    """Write all tables and, with matplotlib, the pictures into `folder`; return a sentence about it."""
    pr, table = curves.precision_recall, curves.confusion
    header = ["recall", "mean at IoU 0.5", "mean at IoU 0.75", "mean at IoU 0.5:0.95", *pr.classes]
    columns = np.stack([RECALL, pr.at_50, pr.at_75, pr.mean, *pr.classes.values()], axis=1)
    _write(folder / "precision_recall.csv", header, ([f"{x:.4g}" for x in row] for row in columns.tolist()))
    _write(folder / "thresholds.csv", ClassPoint._fields, curves.points)
    _write(folder / "confusion.csv", ["truth", *table.names, "missed"], _rows(table))
    _write(folder / "confusions.csv", ["truth", "predicted", "count", "share_of_truth"], table.mistaken())
    at = f"confusion matrix at score {table.threshold:g}"
    try:
        from util.eval_figures import draw_confusion, draw_precision_recall

        draw_precision_recall(pr, folder / "pr_curves.png")
        draw_confusion(table, folder / "confusion.png")
    except UserError as error:
        return f"{at} and curves: tables in {folder}, no pictures: {error}"
    return f"{at} and curves: {folder}"


def read_eval_curves(folder: Path) -> EvalCurves:
    """Return what `write_eval_curves` wrote, to four digits.

    Raises:
        FileNotFoundError: there was no such evaluation.
        ValueError: a file was changed, so that it cannot be read.
    """
    header, *rows = _read(folder / "precision_recall.csv")
    columns = np.asarray(rows, dtype=np.float64).T
    classes = dict(zip(header[4:], columns[4:]))
    points = []
    for category_id, name, objects, *numbers in _read(folder / "thresholds.csv")[1:]:
        points.append(ClassPoint(int(category_id), name, int(objects), *map(float, numbers)))
    header, *rows = _read(folder / "confusion.csv")
    counts = np.asarray([row[1:] for row in rows], dtype=np.int64)
    if not points or len(columns) < 4 or counts.shape != (len(points) + 1,) * 2:
        raise ValueError(f"{folder}: precision_recall.csv, thresholds.csv and confusion.csv do not fit together")
    table = Confusion(header[1:-1], counts, points[0].common_threshold)
    return EvalCurves(PrecisionRecall(*columns[1:4], classes), points, table, None)


def _rows(table: Confusion) -> Iterable[list]:
    return ([name, *row] for name, row in zip([*table.names, "background"], table.counts.tolist()))


def _read(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _write(path: Path, header: Sequence[str], rows: Iterable[Iterable]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
