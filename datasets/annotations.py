"""COCO-format annotation files: checked with readable errors, mended where the meaning is clear, packed into arrays."""

from __future__ import annotations

import json
import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as rle

from datasets.masks import PackedMasks, pack_masks
from util.errors import UserError

OUTSIDE_TOLERANCE = 1.0  # pixels; COCO's own boxes pass the border by rounding
EXAMPLES = 5  # ids that are kept of what was mended


class Fault(NamedTuple):
    """Something that `mend_coco` refuses."""

    what: str  # what is wrong, the same words for all entries of which it is wrong: "annotations whose bbox ..."
    number: object  # id of the entry, whatever the file has in its place
    message: str  # of the error


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


def mend_coco(data: dict, path: Path, notes: Notes | None = None) -> list[str]:
    """Check a COCO-format dict and mend it in place; return what was mended, as sentences.

    Mended: annotations of images that are not listed (dropped); annotation ids that are 0, missing or repeated
    (renumbered: pycocotools takes id 0 for "not matched"); missing `area` (of the mask, else of the box) and `iscrowd`
    (0). Boxes stay as they are: the evaluation counts them as pycocotools does, the training targets clip them.

    Args:
        notes: also gets what was mended, with ids.

    Raises:
        UserError: repeated image or category ids, a malformed image size or box, an unknown category, an `iscrowd`
            that is neither 0 nor 1; names the id.
    """
    images = _by_id(data["images"], "image", "file_name", path)
    for image in data["images"]:
        _refuse(_size_fault(image, path))
    categories = _by_id(data["categories"], "category", "name", path)
    _refuse(_empty_fault(categories, path))
    notes = Notes(path) if notes is None else notes
    listed = []
    for annotation in data["annotations"]:
        number = annotation.get("id")
        image_id = annotation.get("image_id")
        if not _is_number(image_id) or image_id not in images:
            notes.add("of images that are not listed", "dropped", number)
            continue
        _refuse(_annotation_fault(annotation, categories, path))
        if annotation.get("iscrowd") is None:
            notes.add("without iscrowd", "taken as 0", number)
            annotation["iscrowd"] = 0
        if not _is_number(annotation.get("area")):
            notes.add("without area", "computed from the mask or box", number)
            annotation["area"] = _area(annotation, images[image_id])
        listed.append(annotation)
    data["annotations"] = listed
    _renumber(listed, notes)
    return notes.sentences()


def _renumber(annotations: list[dict], notes: Notes) -> None:
    """Number all annotations from 1 if the id of any of them cannot stay."""
    seen: set = set()
    wrong = False
    for annotation in annotations:
        number = annotation.get("id")
        kinds = {
            "whose id is no whole number": not isinstance(number, int),
            "whose id is 0": number == 0,
            "whose id is that of another one": number in seen,
        }
        if kind := next((kind for kind, is_so in kinds.items() if is_so), ""):
            notes.add(kind, "all are renumbered from 1", number)
            wrong = True
        seen.add(number)
    for number, annotation in enumerate(annotations if wrong else (), start=1):
        annotation["id"] = number


class Notes:
    """Counts findings of one file, so that each kind is said once, with an example.

    Attributes:
        found: (what is odd, what is done about it) -> how many, and the first ids.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[str, str], tuple[int, list]] = {}

    def add(self, kind: str, done: str, annotation_id: int | None) -> None:
        """Count one annotation."""
        count, ids = self.found.get((kind, done), (0, []))
        self.found[kind, done] = count + 1, ids if len(ids) == EXAMPLES else [*ids, annotation_id]

    def sentences(self) -> list[str]:
        """Return one sentence for each kind."""
        return [
            f"{self.path}: annotations {kind}, {done}: {count} (the first has id {ids[0]})"
            for (kind, done), (count, ids) in self.found.items()
        ]


def take_out_refused(data: dict, path: Path) -> list[Fault]:
    """Take out of a COCO-format dict what `mend_coco` would refuse, in place; return all of it.

    `mend_coco` stops at the first fault. This is for a report of all of them, and leaves a dict that can be mended,
    unless no category is left. Of entries with one id the first stays; a malformed image size becomes none.
    """
    faults = []
    images = _unique(data["images"], "image", "file_name", path, faults)
    for image in images.values():
        if fault := _size_fault(image, path):
            faults.append(fault)
            image["width"] = image["height"] = None
    if fault := _empty_fault(data["categories"], path):
        faults.append(fault)
        data["annotations"] = []  # no category of theirs is listed, but that is not what is wrong
    categories = _unique(data["categories"], "category", "name", path, faults)
    listed = {entry.get("id") for entry in data["images"] if isinstance(entry.get("id"), int)}
    kept = []
    for annotation in data["annotations"]:
        image_id = annotation.get("image_id")
        if not _is_number(image_id) or image_id not in listed:
            kept.append(annotation)  # dropped when mended, whatever it is like
        elif fault := _annotation_fault(annotation, categories, path):
            faults.append(fault)
        elif image_id in images:
            kept.append(annotation)
    data.update(images=list(images.values()), categories=list(categories.values()), annotations=kept)
    return faults


def _unique(entries: list[dict], kind: str, name: str, path: Path, faults: list[Fault]) -> dict[int, dict]:
    """Return the entries without fault by their id; add the faults of the others to `faults`."""
    found: dict[int, dict] = {}
    for entry in entries:
        if fault := _entry_fault(entry, kind, name, path) or _repeated(entry["id"], found, kind, path):
            faults.append(fault)
        else:
            found[entry["id"]] = entry
    return found


def _refuse(fault: Fault | None) -> None:
    if fault is not None:
        raise UserError(fault.message)


def _by_id(entries: list[dict], kind: str, name: str, path: Path) -> dict[int, dict]:
    """Return the entries by their id, once each of them has a whole number as id, no two the same, and a name."""
    for entry in entries:
        _refuse(_entry_fault(entry, kind, name, path))
    found = {entry["id"]: entry for entry in entries}
    if len(found) != len(entries):
        _refuse(_repeated(Counter(entry["id"] for entry in entries).most_common(1)[0][0], found, kind, path))
    return found


def _repeated(number: int, known: dict[int, dict], kind: str, path: Path) -> Fault | None:
    if number not in known:
        return None
    message = f"{path}: {kind} id {number} occurs more than once in the list; ids must be unique"
    return Fault(f"{_plural(kind)} whose id is that of another one", number, message)


def _entry_fault(entry: dict, kind: str, name: str, path: Path) -> Fault | None:
    number = entry.get("id")
    if isinstance(number, int) and number >= 0 and isinstance(entry.get(name), str):
        return None
    message = f"{path}: the {kind} {entry} needs an `id` (a whole number from 0 on) and a `{name}` (text)"
    return Fault(f"{_plural(kind)} without a whole number as `id`, or without a `{name}`", number, message)


def _empty_fault(categories: list | dict, path: Path) -> Fault | None:
    if categories:
        return None
    message = f"{path}: the list `categories` is empty; name at least one category"
    return Fault("lists of categories that are empty", path.name, message)


def _plural(kind: str) -> str:
    return {"category": "categories"}.get(kind, f"{kind}s")


def _size_fault(image: dict, path: Path) -> Fault | None:
    size = image.get("width"), image.get("height")
    if all(value is None or (_is_number(value) and value >= 0) for value in size):
        return None
    message = f"{path}: image id {image['id']} has width and height {size}; write numbers of pixels"
    return Fault("images whose width or height is no number of pixels", image["id"], message)


def _annotation_fault(annotation: dict, categories: dict[int, dict], path: Path) -> Fault | None:
    number, category, box = (annotation.get(key) for key in ("id", "category_id", "bbox"))
    where = f"{path}: annotation id {number}"
    if not _is_number(category) or category not in categories:
        known = ", ".join(str(i) for i in sorted(categories)[:12]) + (", ..." if len(categories) > 12 else "")
        message = f"{where} has category id {category}; the file knows {known}. Add the category or mend the id"
        return Fault("annotations whose category is not listed", number, message)
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)):
        message = f"{where} has the bbox {box}; it must be four finite numbers [x, y, width, height] in pixels"
        return Fault("annotations whose bbox is not four finite numbers", number, message)
    if annotation.get("iscrowd") not in (None, 0, 1):
        message = f"{where} has iscrowd {annotation['iscrowd']!r}; it must be the number 0 or 1"
        return Fault("annotations whose iscrowd is neither 0 nor 1", number, message)
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _area(annotation: dict, image: dict) -> float:
    """Return the area of the mask, or of the box where there is no usable mask, in square pixels."""
    area = None
    with suppress(Exception):  # pycocotools raises what it likes over odd masks
        area = _mask_area(annotation.get("segmentation"), image.get("height"), image.get("width"))
    return float(annotation["bbox"][2]) * float(annotation["bbox"][3]) if area is None else area


def _mask_area(segmentation: object, height: int | None, width: int | None) -> float | None:
    """Return the number of pixels of a mask, None where there is none."""
    if not (height and width):
        return None
    if isinstance(segmentation, list):
        polygons = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]  # three corners
        return float(rle.area(rle.merge(rle.frPyObjects(polygons, height, width)))) if polygons else None
    if isinstance(segmentation, dict) and "counts" in segmentation:
        if isinstance(segmentation["counts"], list):
            segmentation = rle.frPyObjects(segmentation, height, width)
        return float(rle.area(segmentation))
    return None


@dataclass
class PackedAnnotations:
    """The objects of all images in a few arrays: workers share these pages, which python objects would not allow."""

    first: np.ndarray  # (images + 1,) int64; objects of image i are the rows first[i]:first[i + 1]
    boxes: np.ndarray  # (objects, 4) float32, xywh in pixels, as in the file
    labels: np.ndarray  # (objects,) int64
    areas: np.ndarray  # (objects,) float32
    masks: PackedMasks | None = None


def pack(
    data: dict,
    image_ids: list[int],
    label_of: dict[int, int],
    path: Path,
    notes: Notes | None = None,
    masks_for: str = "",
) -> tuple[PackedAnnotations, list[str]]:
    """Pack the annotations that are not crowd, in the order of `image_ids`; return them and what there is to say.

    With `masks_for`, the sentence about who needs them, masks are packed too, and every object must have one.

    Boxes that reach outside their image or have no area are counted here and clipped or dropped when an image is read,
    because only then its true size is known. `notes` gets them too, with ids.
    """
    per_image: dict[int, list[dict]] = {image_id: [] for image_id in image_ids}
    sizes = {image["id"]: (image.get("width"), image.get("height")) for image in data["images"]}
    notes = Notes(path) if notes is None else notes
    for annotation in data["annotations"]:
        if annotation["iscrowd"]:
            continue
        per_image[annotation["image_id"]].append(annotation)
        outside, empty = _judge(annotation["bbox"], *sizes[annotation["image_id"]])
        if empty:
            notes.add("whose box has no area inside the image", "no training targets", annotation["id"])
        elif outside:
            notes.add("whose box reaches outside the image", "clipped", annotation["id"])
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
