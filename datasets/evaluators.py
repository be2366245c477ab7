"""COCO box evaluation by pycocotools or, with the same numbers, by faster-coco-eval."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.base import DetectionDataset
from util.dist import gather_objects
from util.errors import UserError
from util.structures import Detections, Target

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MAX_DETECTIONS = [1, 10, 100]  # the standard; more detections per image are saved but do not enter these numbers


class ClassRow(NamedTuple):
    """The numbers of one category; -1 where it has no object."""

    category_id: int
    name: str
    AP: float
    AP50: float
    AR100: float
    objects: int


@dataclass
class Evaluated:
    """What COCOeval computed; T IoU thresholds, R recall steps, K categories, A areas, M detection limits."""

    stats: list[float]  # the 12 numbers
    category_ids: list[int]  # of the K axis
    precision: np.ndarray  # (T, R, K, A, M), -1 where there is no object
    recall: np.ndarray  # (T, K, A, M)
    scores: np.ndarray  # (T, R, K, A, M) score at which that recall is reached


class CocoEvaluator:
    """Collects detections, gathers them over processes and computes the twelve COCO numbers.

    Only the images of the data set count, all of them: one without any detection has missed its objects.

    Args:
        topk: best detections kept per image.
        implementation: `pycocotools` is the reference, `faster` is faster-coco-eval, `auto` the latter if installed.

    Raises:
        UserError: faster-coco-eval was asked for and is not installed.
    """

    def __init__(self, dataset: DetectionDataset, *, topk: int = 100, implementation: str = "auto") -> None:
        if implementation not in ("auto", "pycocotools", "faster"):
            raise ValueError(f"implementation {implementation!r}: use auto, pycocotools or faster")
        installed = importlib.util.find_spec("faster_coco_eval") is not None
        if implementation == "faster" and not installed:
            raise UserError("--evaluator faster: run `pip install faster-coco-eval`, or use pycocotools")
        self.faster = installed and implementation != "pycocotools"
        self.dataset, self.topk = dataset, topk
        self._category_ids = np.asarray(dataset.category_ids)
        self._results: dict[int, np.ndarray] = {}  # image id -> (K, 6): x, y, w, h, score, category id
        self._evaluated: Evaluated | None = None

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add the detections of a batch; boxes are xyxy in pixels of the original file, labels those of the model."""
        for found, target in zip(detections, targets, strict=True):
            scores = found.scores.detach().cpu().double().numpy()
            best = np.argsort(-scores, kind="stable")[: self.topk]
            x0, y0, x1, y1 = found.boxes_px.detach().cpu().double().numpy()[best].T
            categories = self._category_ids[found.labels.cpu().numpy()[best]]
            rows = np.stack([x0, y0, x1 - x0, y1 - y0, scores[best], categories], axis=1)
            self._results[int(target.image_id)] = rows[categories >= 0]  # labels that stand for no category drop out
        self._evaluated = None

    def synchronize(self) -> None:
        """Give every process the results of all; keyed by image id, so an image that came twice counts once."""
        self._results = {image_id: rows for part in gather_objects(self._results) for image_id, rows in part.items()}
        self._evaluated = None

    def summarize(self) -> dict[str, float | int | list[float]]:
        """Return `coco_eval_bbox` (the 12 numbers), each of them under its name, and `images`: how many were evaluated.

        A number is -1 where no object of its kind exists.
        """
        stats = self._evaluate().stats
        return {"coco_eval_bbox": stats, **dict(zip(METRICS, stats)), "images": len(self._results)}

    def per_class(self) -> list[ClassRow]:
        """Return one row per category, in the order of the model labels."""
        done = self._evaluate()
        shown = set(self.dataset.image_ids)
        objects = dict.fromkeys(done.category_ids, 0)
        for annotation in self.dataset.coco.dataset["annotations"]:
            if annotation["image_id"] in shown and not annotation["iscrowd"]:
                objects[annotation["category_id"]] += 1
        rows = []
        for category_id, name in zip(self.dataset.category_ids, self.dataset.class_names):
            if category_id < 0:
                continue
            k = done.category_ids.index(category_id)
            numbers = done.precision[:, :, k, 0, -1], done.precision[0, :, k, 0, -1], done.recall[:, k, 0, -1]
            rows.append(ClassRow(category_id, name, *(_mean_of_valid(n) for n in numbers), objects[category_id]))
        return rows

    def table(self) -> str:
        """Return the per-class numbers as text, AP in percent."""
        rows = self.per_class()
        width = max(len(row.name) for row in rows)
        lines = [f"{'class':<{width}} {'objects':>8} {'AP':>6} {'AP50':>6} {'AR100':>6}"]
        for row in rows:
            numbers = " ".join(f"{100 * n:6.1f}" if n >= 0 else f"{'-':>6}" for n in (row.AP, row.AP50, row.AR100))
            lines.append(f"{row.name:<{width}} {row.objects:>8} {numbers}")
        return "\n".join(lines)

    def results(self) -> list[dict]:
        """Return the detections as a COCO results list, images in ascending order of their id."""
        return [
            {"image_id": image_id, "category_id": int(row[5]), "bbox": row[:4].tolist(), "score": float(row[4])}
            for image_id in sorted(self._results)
            for row in self._results[image_id]
        ]

    def save(self, folder: str | Path) -> None:
        """Write `results.json` (the list that test servers take) and `per_class.csv` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(self.results()))
        with open(folder / "per_class.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(ClassRow._fields)
            writer.writerows(self.per_class())

    def save_eval(self, path: str | Path) -> None:
        """Write the arrays of `Evaluated` as tensors, under the keys of the family's `eval.pth`."""
        done = self._evaluate()
        arrays = {key: torch.from_numpy(getattr(done, key)) for key in ("precision", "recall", "scores")}
        torch.save({**arrays, "category_ids": done.category_ids, "max_detections": MAX_DETECTIONS}, path)

    def _evaluate(self) -> Evaluated:
        """Return the evaluation of the results at hand, computed once."""
        if self._evaluated is not None:
            return self._evaluated
        if self.faster:
            from faster_coco_eval import COCO as Truth
            from faster_coco_eval import COCOeval_faster as Evaluation
        else:
            Truth, Evaluation = COCO, COCOeval
        with contextlib.redirect_stdout(io.StringIO()):  # both libraries print progress
            truth = self.dataset.coco if Truth is COCO else Truth(self.dataset.coco.dataset)
            results = self.results()
            evaluation = Evaluation(truth, truth.loadRes(results) if results else _nothing_found(truth), iouType="bbox")
            evaluation.params.imgIds = sorted(self.dataset.image_ids)
            evaluation.params.maxDets = MAX_DETECTIONS
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self._evaluated = Evaluated(
            stats=[float(value) for value in evaluation.stats[: len(METRICS)]],
            category_ids=[int(i) for i in evaluation.params.catIds],
            **{key: np.array(evaluation.eval[key]) for key in ("precision", "recall", "scores")},
        )
        return self._evaluated


def _nothing_found(truth: COCO) -> COCO:
    """Return empty results; `loadRes([])` is an IndexError."""
    empty = type(truth)()
    empty.dataset = {key: truth.dataset[key] for key in ("images", "categories")} | {"annotations": []}
    empty.createIndex()
    return empty


def _mean_of_valid(values: np.ndarray) -> float:
    """Return the mean of the entries above -1, or -1 where there is none."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
