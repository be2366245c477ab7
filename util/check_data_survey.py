"""What is in one set of images and annotations, what is wrong with it, and what the loader does about it.

The loader's own functions are asked (`datasets.annotations`, `datasets.files`), so that the report says what happens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datasets.annotations import EXAMPLES, Fault, Notes, PackedAnnotations, mend_coco, pack, take_out_refused
from util.errors import UserError

REFUSED, MENDED, KEPT = "refused", "mended", "kept"
NO_TARGET = "no training targets"  # as `datasets.annotations.pack` says it
FILE_REFUSED = "the loader refuses the annotation file and training does not start"


@dataclass(frozen=True)
class Finding:
    """One kind of oddity in a set."""

    level: str  # refused: training stops; mended: the loader changes it; kept: the loader leaves it as it is
    what: str
    count: int
    examples: list[str]  # the first ids or files
    action: str  # what will be done
    detail: str = ""  # the error message of the first one

    def lines(self) -> list[str]:
        """Return it as text."""
        shown = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        lines = [f"[{self.level}] {self.what}: {self.count}" + (f" ({shown})" if self.examples else "")]
        lines.append(f"    -> {self.action}")
        return lines + [f"    first: {self.detail}"] * bool(self.detail)


@dataclass
class Survey:
    """One set, as the loader has it after mending; of faulty entries nothing is counted."""

    part: str  # train, val
    source: Path  # annotation file
    image_ids: list[int] = field(default_factory=list)
    entries: list[dict] = field(default_factory=list)  # of the images, in the order of their ids
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # (images, 2) h, w; 0: not known
    categories: dict[int, str] = field(default_factory=dict)  # name by id
    category_of: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (K,) category id of every label
    annotations: int = 0  # in the file
    crowd: int = 0
    without_area: int = 0  # boxes that are said to be no targets
    packed: PackedAnnotations = field(default_factory=lambda: _pack_nothing())  # labels in the order of category ids
    listed: list[dict] = field(default_factory=list)  # the annotations after mending, until `look_closer` is through
    findings: list[Finding] = field(default_factory=list)

    @property
    def image_of(self) -> np.ndarray:
        """(objects,) place of the image of every object."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.packed.first))

    def targets(self) -> np.ndarray:
        """Return (objects,) bool: what remains as a training target, by the rule of `CocoDetection.load`."""
        corners = self.packed.boxes.copy()
        corners[:, 2:] += corners[:, :2]
        limits = np.where(self.sizes > 0, self.sizes, np.inf).astype(np.float32)[self.image_of]
        high, wide = limits[:, :1], limits[:, 1:]
        corners[:, 0::2] = np.clip(corners[:, 0::2], 0, wide)
        corners[:, 1::2] = np.clip(corners[:, 1::2], 0, high)
        return (corners[:, 2:] > corners[:, :2]).all(axis=1)

    def add(self, level: str, what: str, examples: Sequence, action: str, detail: str = "") -> None:
        """Add a finding about so many `examples`, unless there are none."""
        if len(examples):
            shown = [str(example) for example in examples[:EXAMPLES]]
            self.findings.append(Finding(level, what, len(examples), shown, action, detail))


def survey(part: str, source: Path, data: dict) -> Survey:
    """Return what is in a COCO-format dict, which is changed in place.

    Args:
        part: `train` or `val`.
        source: where it comes from, for messages.
    """
    result = Survey(part, source, annotations=len(data["annotations"]))
    for faults in by_kind(take_out_refused(data, source)):
        result.add(REFUSED, faults[0].what, [f.number for f in faults], FILE_REFUSED, faults[0].message)
    notes = Notes(source)
    if data["categories"]:
        mend_coco(data, source, notes)
    else:
        data["annotations"] = []
    result.entries = sorted(data["images"], key=lambda image: image["id"])
    result.image_ids = [image["id"] for image in result.entries]
    sizes = [(image.get("height") or 0, image.get("width") or 0) for image in result.entries]
    result.sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
    result.categories = {c["id"]: c["name"] for c in sorted(data["categories"], key=lambda c: c["id"])}
    result.category_of = np.asarray(list(result.categories), np.int64)
    labels = {category_id: label for label, category_id in enumerate(result.categories)}
    result.packed, _ = pack(data, result.image_ids, labels, source, notes)
    for (what, done), (count, ids) in notes.found.items():
        result.findings.append(Finding(MENDED, f"annotations {what}", count, [str(i) for i in ids], done))
    noted = sum(count for (_, done), (count, _) in notes.found.items() if done == NO_TARGET)
    result.without_area, result.listed = noted, data["annotations"]
    return result


def look_closer(result: Survey, queries: int, topk: int) -> None:
    """Add what the loader says nothing about; best after the sizes of the files are known.

    Args:
        queries: that can be matched with objects in training. topk: detections kept in evaluation.
    """
    _look_at_images(result)
    _look_at_annotations(result, result.listed)
    _look_at_categories(result)
    _look_at_objects(result, queries, topk)
    result.listed = []


def _pack_nothing() -> PackedAnnotations:
    return pack({"images": [], "annotations": []}, [], {}, Path())[0]


def by_kind(faults: Iterable[Fault]) -> list[list[Fault]]:
    """Return the faults of one kind together."""
    kinds: dict[str, list[Fault]] = {}
    for fault in faults:
        kinds.setdefault(fault.what, []).append(fault)
    return list(kinds.values())


def _look_at_images(result: Survey) -> None:
    unsized = [image["id"] for image in result.entries if not (image.get("width") and image.get("height"))]
    result.add(KEPT, "images without width or height in the annotation file", unsized, "taken from the image file")
    names = Counter(image["file_name"] for image in result.entries)
    twice = [name for name, count in names.items() if count > 1]
    result.add(KEPT, "image files that several images of the list share", twice, "each is an image of its own")


def _look_at_annotations(result: Survey, annotations: list[dict]) -> None:
    crowd = [annotation["id"] for annotation in annotations if annotation["iscrowd"]]
    result.crowd = len(crowd)
    result.add(KEPT, "crowd regions", crowd, "no training targets; the evaluation ignores detections on them")
    flat = [a["id"] for a in annotations if not a["iscrowd"] and a["area"] <= 0]
    result.add(KEPT, "annotations with an area of 0 or less", flat, "the evaluation counts them as small objects")
    ids = np.asarray(_packed_ids(result, annotations), dtype=object)
    boxes, labels = result.packed.boxes.astype(np.float64), result.packed.labels[:, None]
    place = np.column_stack([result.image_of, boxes])
    same = _repeated(np.column_stack([place, labels]))
    copies = "annotations that repeat the box and category of another one"
    result.add(KEPT, copies, ids[same], "each is a target of its own, and one of them is always missed: remove them")
    others = _repeated(place) & ~same
    relabelled = "annotations that have the box of another one, in another category"
    result.add(KEPT, relabelled, ids[others], "each is a target of its own")


def _packed_ids(result: Survey, annotations: list[dict]) -> list[int]:
    """Return the annotation ids in the order of the packed rows."""
    of_image: dict[int, list[int]] = {image_id: [] for image_id in result.image_ids}
    for annotation in annotations:
        if not annotation["iscrowd"]:
            of_image[annotation["image_id"]].append(annotation["id"])
    return [number for image_id in result.image_ids for number in of_image[image_id]]


def _repeated(rows: np.ndarray) -> np.ndarray:
    """Return (n,) bool: the row equals one above it."""
    if not len(rows):
        return np.zeros(0, bool)
    order = np.lexsort(rows.T)  # stable: of equal rows the first stays first
    found = np.zeros(len(rows), bool)
    found[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return found


def _look_at_categories(result: Survey) -> None:
    used = set(result.category_of[np.unique(result.packed.labels[result.targets()])].tolist())
    idle = [f"{number} {name}" for number, name in result.categories.items() if number not in used]
    action = "their class outputs learn only to stay silent" if result.part == "train" else "they have no AP"
    result.add(KEPT, "categories without any object", idle, action)
    names = Counter(result.categories.values())
    result.add(KEPT, "category names that occur more than once", [n for n, c in names.items() if c > 1], "told by id")


def _of_empty(part: str) -> str:
    """Return what images without objects are good for."""
    return "they teach what is background" if part == "train" else "what is detected in them counts as wrong"


def _look_at_objects(result: Survey, queries: int, topk: int) -> None:
    """Add what follows from the number of objects of the images."""
    # Found only now: the annotation file gives no size of the image, or float32 rounds the box away.
    silent = int((~result.targets()).sum()) - result.without_area
    if silent > 0:
        what = "further annotations whose box has no area inside the image once it is read"
        result.findings.append(Finding(MENDED, what, silent, [], NO_TARGET))
    per_image = np.bincount(result.image_of[result.targets()], minlength=len(result.image_ids))
    ids = np.asarray(result.image_ids, dtype=object)
    result.add(KEPT, "images without objects", ids[per_image == 0], _of_empty(result.part))
    if result.part == "train":
        action = f"at most {queries} of the objects get a query in a step: raise --num_queries_one2one"
        result.add(KEPT, f"images with more than {queries} objects", ids[per_image > queries], action)
    else:
        action = f"detections are cut to --topk {topk}, the others are missed"
        result.add(KEPT, f"images with more than {topk} objects", ids[per_image > topk], action)


def refused(finding: Sequence[Finding]) -> bool:
    """Say whether training would stop."""
    return any(f.level == REFUSED for f in finding)


def verdict(result: Survey, error: UserError | None) -> None:
    """Add what the loader says when it is built, unless a finding says it already."""
    if error is not None and not refused(result.findings):
        result.add(REFUSED, f"{result.part} set", [result.source.name], "the loader refuses it", str(error))
