"""COCO-format annotation files: checked with readable errors, mended where the meaning is clear, packed into arrays."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from datasets.masks import PackedMasks, pack_masks
from util.errors import UserError

OUTSIDE_TOLERANCE = 1.0  # pixels; COCO's own boxes pass the border by rounding


def read_coco(path: Path, flag: str) -> dict:
    """Return the content of a COCO-format file.

    Args:
        flag: the command-line flag that names the file, for messages.

    Raises:
        UserError: no such file, not JSON, or one of `images`, `annotations`, `categories` is missing.
    """
    if not path.is_file():
        raise UserError(f"annotation file {path} does not exist; give the right one by {flag}")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:  # also of wrong encodings
        raise UserError(f"annotation file {path} is not valid JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(
                f"annotation file {path} has no list `{key}`: this is not the COCO format (a dict with images, "
                f"annotations and categories; `annotations` may be empty). Convert the file, or mend {flag}"
            )
        odd = next((entry for entry in data[key] if not isinstance(entry, dict)), None)
        if odd is not None:
            raise UserError(f"annotation file {path}: `{key}` has the entry {odd!r}; write an object {{}}")
    return data


def mend_coco(data: dict, path: Path) -> list[str]:
    """Check a COCO-format dict and mend it in place; return what was mended, as sentences.

    Mended: annotations of images that are not listed (dropped); annotation ids that are 0, missing or repeated
    (renumbered: pycocotools takes id 0 for "not matched"); missing `area` (of the mask, else of the box) and `iscrowd`
    (0). Boxes stay as they are: the evaluation counts them as pycocotools does, the training targets clip them.

    Raises:
        UserError: repeated image or category ids, a malformed image size or box, an unknown category, an `iscrowd`
            that is neither 0 nor 1; names the id.
    """
    images = _by_id(data["images"], "image", "file_name", path)
    for image in data["images"]:
        size = image.get("width"), image.get("height")
        if not all(value is None or (_is_number(value) and value >= 0) for value in size):
            raise UserError(f"{path}: image id {image['id']} has width and height {size}; write numbers of pixels")
    categories = _by_id(data["categories"], "category", "name", path)
    if not categories:
        raise UserError(f"{path}: the list `categories` is empty; name at least one category")
    notes = _Notes(path)
    listed = []
    for annotation in data["annotations"]:
        number = annotation.get("id")
        image_id = annotation.get("image_id")
        if not _is_number(image_id) or image_id not in images:
            notes.add("of images that are not listed, dropped", number)
            continue
        _check_annotation(annotation, categories, path)
        if annotation.get("iscrowd") is None:
            notes.add("without iscrowd, taken as 0", number)
            annotation["iscrowd"] = 0
        if not _is_number(annotation.get("area")):
            notes.add("without area, computed from the mask or box", number)
            annotation["area"] = _area(annotation, images[image_id])
        listed.append(annotation)
    data["annotations"] = listed
    seen: set = set()
    for annotation in listed:
        number = annotation.get("id")
        if not isinstance(number, int) or number == 0 or number in seen:
            notes.add("whose id is 0, repeated or no whole number (all are renumbered from 1)", number)
        seen.add(number)
    if notes.has("renumbered"):
        for number, annotation in enumerate(listed, start=1):
            annotation["id"] = number
    return notes.sentences()


class _Notes:
    """Counts findings of one file, so that each kind is said once, with an example."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list] = {}  # kind -> [count, first annotation id]

    def add(self, kind: str, annotation_id: int | None) -> None:
        self.found.setdefault(kind, [0, annotation_id])[0] += 1

    def has(self, part: str) -> bool:
        return any(part in kind for kind in self.found)

    def sentences(self) -> list[str]:
        return [
            f"{self.path}: annotations {kind}: {count} (the first has id {first})"
            for kind, (count, first) in self.found.items()
        ]


def _by_id(entries: list[dict], kind: str, name: str, path: Path) -> dict[int, dict]:
    """Return the entries by their id, once each of them has a whole number as id, no two the same, and a name."""
    for entry in entries:
        number = entry.get("id")
        if not isinstance(number, int) or number < 0 or not isinstance(entry.get(name), str):
            raise UserError(
                f"{path}: the {kind} {entry} needs an `id` (a whole number from 0 on) and a `{name}` (text)"
            )
    found = {entry["id"]: entry for entry in entries}
    if len(found) != len(entries):
        twice = Counter(entry["id"] for entry in entries).most_common(1)[0][0]
        raise UserError(f"{path}: {kind} id {twice} occurs more than once in the list; ids must be unique")
    return found


def _check_annotation(annotation: dict, categories: dict[int, dict], path: Path) -> None:
    where = f"{path}: annotation id {annotation.get('id')}"
    category, box = annotation.get("category_id"), annotation.get("bbox")
    if not _is_number(category) or category not in categories:
        known = ", ".join(str(i) for i in sorted(categories)[:12]) + (", ..." if len(categories) > 12 else "")
        raise UserError(f"{where} has category id {category}; the file knows {known}. Add the category or mend the id")
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        raise UserError(f"{where} has the bbox {box}; it must be four finite numbers [x, y, width, height] in pixels")
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise UserError(f"{where} has iscrowd {annotation['iscrowd']!r}; it must be the number 0 or 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _area(annotation: dict, image: dict) -> float:
    """Return the area of the mask, or of the box where there is no mask, in square pixels."""
    segmentation, size = annotation.get("segmentation"), (image.get("height"), image.get("width"))
    if all(size) and isinstance(segmentation, list):
        polygons = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]  # three corners
        if polygons:
            return float(rle.area(rle.merge(rle.frPyObjects(polygons, *size))))
    elif all(size) and isinstance(segmentation, dict) and "counts" in segmentation:
        if isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, *size)
        return float(rle.area(segmentation))
    return float(annotation["bbox"][2]) * float(annotation["bbox"][3])


@dataclass
class PackedAnnotations:
    """The objects of all images in a few arrays: workers share these pages, which python objects would not allow."""

    first: np.ndarray  # (images + 1,) int64; objects of image i are the rows first[i]:first[i + 1]
    boxes: np.ndarray  # (objects, 4) float32, xywh in pixels, as in the file
    labels: np.ndarray  # (objects,) int64
    areas: np.ndarray  # (objects,) float32
    masks: PackedMasks | None = None


def pack(
    data: dict, image_ids: list[int], label_of: dict[int, int], path: Path, masks_for: str = ""
) -> tuple[PackedAnnotations, list[str]]:
    """Pack the annotations that are not crowd, in the order of `image_ids`; return them and what there is to say.

    With `masks_for`, the sentence about who needs them, masks are packed too, and every object must have one.

    Boxes that reach outside their image or have no area are counted here and clipped or dropped when an image is read,
    because only then its true size is known.
    """
    per_image: dict[int, list[dict]] = {image_id: [] for image_id in image_ids}
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in data["images"]}
    notes = _Notes(path)
    for annotation in data["annotations"]:
        if annotation["iscrowd"]:
            continue
        per_image[annotation["image_id"]].append(annotation)
        outside, empty = _judge(annotation["bbox"], *sizes[annotation["image_id"]])
        if empty:
            notes.add("whose box has no area inside the image, no training targets", annotation["id"])
        elif outside:
            notes.add("whose box reaches outside the image, clipped", annotation["id"])
    ordered = [annotation for image_id in image_ids for annotation in per_image[image_id]]
    counts = [len(per_image[image_id]) for image_id in image_ids]
    packed = PackedAnnotations(
        first=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        boxes=np.asarray([a["bbox"] for a in ordered], np.float32).reshape(-1, 4),
        labels=np.asarray([label_of[a["category_id"]] for a in ordered], np.int64),
        areas=np.asarray([a["area"] for a in ordered], np.float32),
        masks=pack_masks(ordered, sizes, path, masks_for) if masks_for else None,
    )
    return packed, notes.sentences()


def _judge(box: list[float], width: int | None, height: int | None) -> tuple[bool, bool]:
    """Return whether an xywh box passes the border of its image, and whether nothing of it lies inside."""
    x, y, w, h = box
    width, height = width or math.inf, height or math.inf
    outside = min(x, y) < -OUTSIDE_TOLERANCE or x + w > width + OUTSIDE_TOLERANCE or y + h > height + OUTSIDE_TOLERANCE
    empty = min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0)
    return outside, empty
