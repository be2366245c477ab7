"""What the tests of the evaluator share: COCO results fed to it as a model would, and results drawn at random."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets.base import silent_coco
from datasets.eval_backends import BACKENDS, Evaluated, find_backend
from datasets.evaluators import CocoEvaluator
from util.errors import UserError
from util.structures import Detections, Target


def packages() -> list:
    """Return the names of all packages as parameters, marked as skipped where one is not installed."""
    found = []
    for name in BACKENDS:
        try:
            find_backend(name)
        except UserError as error:
            found.append(pytest.param(name, marks=pytest.mark.skip(reason=str(error))))
        else:
            found.append(name)
    return found


def target_of(image_id: int) -> Target:
    return Target(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), image_id, (1, 1))


def detections(dataset, entries: list[dict]) -> Detections:
    """Return the COCO result entries of one image as the model would give them."""
    corners = torch.tensor([e["bbox"] for e in entries], dtype=torch.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    labels = torch.tensor([dataset.category_ids.index(e["category_id"]) for e in entries], dtype=torch.int64)
    return Detections(torch.tensor([e["score"] for e in entries], dtype=torch.float64), labels, corners)


def evaluate(dataset, entries: list[dict], implementation: str = "pycocotools", **options) -> CocoEvaluator:
    """Return an evaluator that has seen every image of the data set with these COCO result entries."""
    evaluator = CocoEvaluator(dataset, implementation=implementation, **options)
    for image_id in dataset.image_ids:
        mine = [entry for entry in entries if entry["image_id"] == image_id]
        evaluator.update([detections(dataset, mine)], [target_of(image_id)])
    return evaluator


def assert_same(found: Evaluated, reference: Evaluated) -> None:
    """Compare all numbers; 1e-12 because the order of a sum differs between packages."""
    assert found.category_ids == reference.category_ids
    np.testing.assert_allclose(found.stats, reference.stats, rtol=0, atol=1e-12)
    for key in ("precision", "recall", "scores"):
        np.testing.assert_allclose(getattr(found, key), getattr(reference, key), rtol=0, atol=1e-12, err_msg=key)


def drawn(
    seed: int,
    *,
    images: int = 12,
    objects: tuple[int, int] = (1, 7),
    found: tuple[int, int] = (5, 30),
    crowd: float = 0.0,
    digits: int = 9,
    classes_with_objects: int = 3,
    unordered: bool = False,
) -> tuple[SimpleNamespace, list[tuple[Detections, Target]]]:
    """Return a data set of three classes of all sizes, and detections of its images, half of them near an object.

    Args:
        objects: fewest and most per image.
        found: fewest and most detections per image.
        crowd: share of crowd regions.
        digits: decimals of the scores; with few of them there are ties.
        unordered: image ids in no order.
    """
    rng = np.random.default_rng(seed)
    ids = rng.choice(10**6, images, replace=False).tolist()
    categories = [{"id": i, "name": f"kind {i}"} for i in (7, 3, 11)]
    annotations = []
    for owner in np.repeat(ids, rng.integers(objects[0], objects[1] + 1, images)).tolist():
        sides = rng.choice([6.0, 20.0, 60.0, 150.0], 2) + rng.random(2)
        box = [*rng.integers(0, 100, 2).tolist(), *sides.tolist()]
        category = categories[rng.integers(classes_with_objects)]["id"]
        more = {"area": float(sides.prod() * 0.9), "iscrowd": int(rng.random() < crowd)}
        annotations.append(
            {"id": len(annotations) + 1, "image_id": owner, "category_id": category, "bbox": box, **more}
        )
    coco = silent_coco({"images": [{"id": i} for i in ids], "categories": categories, "annotations": annotations})
    batch = []
    for owner in ids:
        count = int(rng.integers(found[0], found[1] + 1))
        boxes = np.concatenate([rng.integers(0, 100, (count, 2)), rng.integers(1, 150, (count, 2))], axis=1)
        labels = rng.integers(3, size=count)
        near = coco.imgToAnns.get(owner, [])
        for i in range(count * bool(near)):
            if rng.random() < 0.5:
                chosen = near[rng.integers(len(near))]
                boxes[i], labels[i] = chosen["bbox"] + rng.integers(0, 4, 4), [3, 7, 11].index(chosen["category_id"])
        boxes[:, 2:] += boxes[:, :2]
        scores = np.round(rng.random(count), digits)
        tensors = (torch.from_numpy(x) for x in (scores.astype("f4"), labels, boxes.astype("f4")))
        batch.append((Detections(*tensors), target_of(owner)))
    listed = ids if unordered else sorted(ids)
    names = ["kind 3", "kind 7", "kind 11"]
    return SimpleNamespace(coco=coco, image_ids=listed, category_ids=[3, 7, 11], class_names=names), batch


def feed(evaluator: CocoEvaluator, batch: list[tuple[Detections, Target]], size: int = 4) -> CocoEvaluator:
    """Give `batch` to the evaluator, `size` images at a time, and return it."""
    for start in range(0, len(batch), size):
        found, targets = zip(*batch[start : start + size])
        evaluator.update(list(found), list(targets))
    return evaluator
