"""Which detection found which object, at one IoU: what precision, recall and the confusion matrix are counted from.

The rule is that of COCO's evaluation (cocoeval.py, `evaluateImg`): detections choose in the order of their scores; each
takes the free object of its class that it overlaps most, if the IoU is large enough; one that took none but lies in a
crowd region of its class does not count. Because a detection never changes what better ones took, one matching serves
all score thresholds: a higher threshold only leaves out its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as rle

IOU = 0.5  # least overlap of a detection and the object it found


@dataclass(frozen=True)
class Boxes:
    """Boxes of all images in flat arrays, image after image."""

    image: np.ndarray  # (N,) int64, place in the data set's `image_ids`
    label: np.ndarray  # (N,) int64, row of the class: 0..K-1 in the order of the model labels, without empty slots
    xywh: np.ndarray  # (N, 4) float64, pixels
    score: np.ndarray  # (N,) of detections, within an image the best first; 1 for objects
    crowd: np.ndarray  # (N,) bool, of objects; False for detections

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: np.ndarray) -> Boxes:
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Matches:
    """Detections and objects of a data set, and what each detection found."""

    names: list[str]  # of the K classes
    category_ids: list[int]
    found: Boxes
    objects: Boxes  # crowd regions included
    object_of: np.ndarray  # (detections,) row of `objects` that it found, -1: none
    ignored: np.ndarray  # (detections,) bool: in a crowd region of its class

    @property
    def hit(self) -> np.ndarray:
        """(detections,) bool: found an object of its class."""
        return self.object_of >= 0

    @property
    def per_class(self) -> np.ndarray:
        """(K,) number of objects without crowd regions."""
        return np.bincount(self.objects.label[~self.objects.crowd], minlength=len(self.names))


def match_all(dataset: Any, results: Mapping[int, np.ndarray], iou: float = IOU) -> Matches:
    """Match the detections of a data set to its objects, class by class.

    Args:
        dataset: offers `image_ids`, `category_ids`, `class_names` and `coco`, as `DetectionDataset` does.
        results: image id -> (n, 6) x, y, w, h, score, category id; the best first (`CocoEvaluator.rows`).
    """
    used = [(i, name) for i, name in zip(dataset.category_ids, dataset.class_names) if i >= 0]
    row_of = {category_id: row for row, (category_id, _) in enumerate(used)}
    found, objects = _detections(dataset, results, row_of), _objects(dataset, row_of)
    free = np.flatnonzero(~objects.crowd)
    taken = assign(found, objects[free], iou, same_class=True)
    object_of = np.where(taken >= 0, free[taken] if len(free) else -1, -1)
    regions = objects[objects.crowd]
    inside, _, _ = _pairs(found, regions, iou, same_class=True)
    ignored = np.zeros(len(found), dtype=bool)
    ignored[inside] = True
    return Matches([n for _, n in used], [i for i, _ in used], found, objects, object_of, ignored & (object_of < 0))


def assign(found: Boxes, objects: Boxes, iou: float, *, same_class: bool) -> np.ndarray:
    """Return, for each detection, the row of the object it takes, (detections,) int64, -1 for none.

    Args:
        same_class: only objects of the detection's class; else any.
    """
    detection, candidate, overlap = _pairs(found, objects, iou, same_class=same_class)
    # Detections in their order, of each the largest overlap first; of equal ones the later object, as COCO does.
    order = np.lexsort((-candidate, -overlap, detection))
    taken, free = [-1] * len(found), [True] * len(objects)
    for d, o in zip(detection[order].tolist(), candidate[order].tolist()):
        if taken[d] < 0 and free[o]:
            taken[d], free[o] = o, False
    return np.asarray(taken, dtype=np.int64)


def _pairs(found: Boxes, objects: Boxes, iou: float, *, same_class: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (P,) detection, object and IoU of the pairs of an image that overlap enough.

    The overlap with a crowd region is the share of the detection inside it, as `pycocotools` counts.
    """
    images = np.intersect1d(found.image, objects.image)
    ends = [np.searchsorted(boxes.image, images, side) for boxes in (found, objects) for side in ("left", "right")]
    crowd = objects.crowd.astype(np.uint8)
    nothing = np.zeros(0, dtype=np.int64)
    parts = [(nothing, nothing, np.zeros(0))]
    for d0, d1, o0, o1 in zip(*(end.tolist() for end in ends)):
        overlap = rle.iou(found.xywh[d0:d1], objects.xywh[o0:o1], crowd[o0:o1])
        near = overlap >= iou
        if same_class:
            near &= found.label[d0:d1, None] == objects.label[None, o0:o1]
        d, o = np.nonzero(near)
        parts.append((d + d0, o + o0, overlap[d, o]))
    return tuple(np.concatenate(column) for column in zip(*parts))


def _detections(dataset: Any, results: Mapping[int, np.ndarray], row_of: dict[int, int]) -> Boxes:
    own = [results.get(image_id, np.zeros((0, 6))) for image_id in dataset.image_ids]
    rows = np.concatenate([np.zeros((0, 6)), *own])
    image = np.repeat(np.arange(len(own)), [len(part) for part in own])
    label = np.asarray([row_of[category] for category in rows[:, 5].astype(np.int64).tolist()], dtype=np.int64)
    boxes = np.ascontiguousarray(rows[:, :4])
    return Boxes(image, label, boxes, rows[:, 4], np.zeros(len(rows), dtype=bool))


def _objects(dataset: Any, row_of: dict[int, int]) -> Boxes:
    entries = [(place, a) for place, i in enumerate(dataset.image_ids) for a in dataset.coco.imgToAnns.get(i, [])]
    return Boxes(
        image=np.asarray([place for place, _ in entries], dtype=np.int64),
        label=np.asarray([row_of[a["category_id"]] for _, a in entries], dtype=np.int64),
        xywh=np.asarray([a["bbox"] for _, a in entries], dtype=np.float64).reshape(-1, 4),
        score=np.ones(len(entries)),
        crowd=np.asarray([bool(a["iscrowd"]) for _, a in entries], dtype=bool),
    )
