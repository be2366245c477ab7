"""COCO box evaluation: collects the detections, the packages of `datasets.eval_backends` compute the numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.base import DetectionDataset
from datasets.eval_backends import MAX_DETECTIONS, NOTHING, Evaluated, Results, as_entries, find_backend
from util import dist
from util.errors import UserError
from util.structures import Detections, Target

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class ClassRow(NamedTuple):
    """The numbers of one category; -1 where it has no object."""

    category_id: int
    name: str
    AP: float
    AP50: float
    AR100: float
    objects: int


class CocoEvaluator:
    """Collects detections, gathers them over processes and computes the twelve COCO numbers.

    Only the images of the data set count, all of them: one without any detection has missed its objects. The ground
    truth is converted here, once: `reset` and use the evaluator again rather than making another one.

    Args:
        topk: best detections kept per image.
        implementation: package that computes, a name of `datasets.eval_backends.BACKENDS`, or `auto` for the fastest
            one that is installed. All give the same numbers.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, dataset: DetectionDataset, *, topk: int = 100, implementation: str = "auto") -> None:
        self.backend = find_backend(implementation)(dataset.coco, dataset.image_ids)
        self.dataset, self.topk = dataset, topk
        self._image_ids = set(dataset.image_ids)
        self._category_ids = np.asarray(dataset.category_ids)
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self.backend.reset()
        self._results: dict[int, np.ndarray] = {}  # image id -> (K, 6): x, y, w, h, score, category id; the best first
        self._evaluated: Evaluated | None = None

    def update(self, detections: list[Detections], targets: list[Target]) -> None:
        """Add the detections of a batch; boxes are xyxy in pixels of the original file, labels those of the model.

        Detections with a number that is not finite are left out. Waits for the device once.

        Raises:
            ValueError: an image that is not in the data set, or not one target per image.
        """
        image_ids = [int(target.image_id) for target in targets]
        if len(detections) != len(targets) or not self._image_ids.issuperset(image_ids):
            raise ValueError(
                f"detections of {len(detections)} images for image ids {image_ids[:8]}: one target per image, and only "
                "images of the data set"
            )
        counts = [len(found.scores) for found in detections]
        columns = _to_host(detections)
        rows, image = self._best(columns, np.repeat(np.arange(len(counts)), counts))
        results = dict(zip(image_ids, _split(rows, np.bincount(image, minlength=len(counts)))))
        self.backend.add(results)
        self._results.update(results)
        self._evaluated = None

    def _best(self, columns: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows that are kept, (n, 6), and of which image each is, (n,), image after image, best first.

        Args:
            columns: (m, 6) x0, y0, x1, y1, score, label of the model.
            image: (m,) ascending.
        """
        finite = np.isfinite(columns).all(axis=1)
        columns, image = columns[finite], image[finite]
        order = np.lexsort((-columns[:, 4], image))  # stable: ties keep the order of the model
        columns = columns[order]
        rank = np.arange(len(image)) - np.searchsorted(image, image)
        x0, y0, x1, y1, scores, labels = columns.T
        categories = self._category_ids[labels.astype(np.int64)]
        kept = (rank < self.topk) & (categories >= 0)  # labels that stand for no category drop out
        rows = np.stack([x0, y0, x1 - x0, y1 - y0, scores, categories], axis=1)
        return rows[kept], image[kept]

    def synchronize(self) -> None:
        """Give every process the results of all; keyed by image id, so an image that came twice counts once."""
        if not dist.is_distributed():
            return
        own = self._results
        packed = list(own), [len(rows) for rows in own.values()], np.concatenate([NOTHING, *own.values()])
        self._results = {}
        for rank, (image_ids, counts, rows) in enumerate(dist.gather_objects(packed)):
            # The same arrays, not copies of them: the backend knows them and need not match them again.
            self._results.update(own if rank == dist.rank() else zip(image_ids, _split(rows, counts)))
        self._evaluated = None

    def summarize(self) -> dict[str, float | int | list[float]]:
        """Return `coco_eval_bbox` (the 12 numbers), each of them under its name, and `images`: how many were evaluated.

        A number is -1 where no object of its kind exists.
        """
        stats = self.evaluated().stats
        return {"coco_eval_bbox": stats, **dict(zip(METRICS, stats)), "images": len(self._results)}

    def per_class(self) -> list[ClassRow]:
        """Return one row per category, in the order of the model labels."""
        done = self.evaluated()
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

    @property
    def rows(self) -> Results:
        """The detections by image id, the best first; after `synchronize` those of all processes."""
        return self._results

    def load(self, path: str | Path) -> None:
        """Take the detections of an earlier evaluation, from its `results.json`, in place of those at hand.

        Raises:
            UserError: no such list, or of images or categories that this data set does not have.
        """
        self.reset()
        rows: dict[int, list[list[float]]] = {}
        try:
            for entry in json.loads(Path(path).read_text()):
                row = [*entry["bbox"], entry["score"], entry["category_id"]]
                rows.setdefault(entry["image_id"], []).append(row)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no COCO results list ({error!r}): evaluate again") from error
        used = {int(row[-1]) for own in rows.values() for row in own}
        if not (self._image_ids.issuperset(rows) and used <= set(self.dataset.category_ids) - {-1}):
            raise UserError(f"{path} has images or categories that the data set does not have: it is of other data")
        self._results = {i: _best_first(np.asarray(own, dtype=np.float64)) for i, own in rows.items()}

    def results(self) -> list[dict]:
        """Return the detections as a COCO results list, images in ascending order of their id."""
        return as_entries(self._results)

    def save(self, folder: str | Path) -> None:
        """Write `results.json` (the list that test servers take) and `per_class.csv` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(self.results()))
        with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(ClassRow._fields)
            writer.writerows(self.per_class())

    def save_eval(self, path: str | Path) -> None:
        """Write the arrays of `Evaluated` as tensors, under the keys of the family's `eval.pth`."""
        done = self.evaluated()
        arrays = {key: torch.from_numpy(getattr(done, key)) for key in ("precision", "recall", "scores")}
        torch.save({**arrays, "category_ids": done.category_ids, "max_detections": MAX_DETECTIONS}, path)

    def evaluated(self) -> Evaluated:
        """Return the evaluation of the results at hand, computed once."""
        if self._evaluated is None:
            self._evaluated = self.backend.evaluate(self._results)
        return self._evaluated


def _to_host(detections: list[Detections]) -> np.ndarray:
    """Return (n, 6) float64 x0, y0, x1, y1, score, label of all detections; one copy from the device."""
    boxes = torch.cat([found.boxes_px for found in detections])
    scores = torch.cat([found.scores for found in detections])
    labels = torch.cat([found.labels for found in detections])
    # At least float32, which holds labels up to 2^24; not float64, which not every device has.
    dtype = torch.promote_types(torch.promote_types(boxes.dtype, scores.dtype), torch.float32)
    columns = torch.cat([part.to(dtype) for part in (boxes, scores[:, None], labels[:, None])], dim=1)
    return columns.detach().cpu().double().numpy()


def _best_first(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-rows[:, 4], kind="stable")]


def _split(rows: np.ndarray, counts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Return the first `counts[0]` rows, the next `counts[1]`, and so on; views."""
    return np.split(rows, np.cumsum(counts, dtype=np.int64))[:-1]


def _mean_of_valid(values: np.ndarray) -> float:
    """Return the mean of the entries above -1, or -1 where there is none."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
