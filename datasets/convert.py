"""Other annotation formats to COCO's: `main.py --convert_data voc|yolo SRC --output_dir DST`.

The readers are `datasets.convert_voc` and `datasets.convert_yolo`. Here is what they share: the sizes of images, the
clipping of boxes, what there is to say, and the files. Images are neither copied nor changed.
"""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from util import dist
from util.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
DIGITS = 4  # of a pixel, in the written boxes
ROUNDING = 0.01  # pixels that a box may pass the border by before it is counted as clipped
EXIF_TURN = 0x0112
USED = ("train", "val")  # splits that `main.py` has flags for


@dataclass
class Thing:
    """One object: its class by name, its box (x1, y1, x2, y2) in pixels from 0, and more fields of its annotation."""

    name: str
    box: tuple[float, float, float, float]
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Picture:
    """One image of a split: its path below the image folder, its size in pixels and its objects."""

    file_name: str
    width: int
    height: int
    things: list[Thing] = field(default_factory=list)


@dataclass
class Split:
    """The images of one part of a data set, all below one folder, in the order of their ids."""

    name: str
    folder: Path
    pictures: list[Picture]


class Findings:
    """Counts what was found in the files, by kind, and keeps the first place of each."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, place: str) -> None:
        """Count one more of `kind`, found at `place`."""
        count, first = self.found.get(kind, (0, place))
        self.found[kind] = count + 1, first

    def sentences(self) -> list[str]:
        """Return one line per kind."""
        return [f"{kind}: {count} (the first: {first})" for kind, (count, first) in self.found.items()]


def convert_command(args: Namespace) -> None:
    """Run `main.py --convert_data FORMAT SRC --output_dir DST`."""
    kind, source = args.convert_data
    paths = convert(
        kind,
        Path(source),
        Path(args.output_dir),
        class_names=args.class_names,
        keep_difficult=args.keep_difficult,
        voc_first_pixel=args.voc_first_pixel,
    )
    flags = [f"--{part}_images {folder} --{part}_json {path}" for path, folder, part in paths if part in USED]
    if flags:
        dist.info("flags for training: " + " ".join(flags))


def convert(
    kind: str,
    source: Path,
    target: Path,
    *,
    class_names: str = "",
    keep_difficult: bool = False,
    voc_first_pixel: int = 1,
) -> list[tuple[Path, Path, str]]:
    """Write `target/instances_SPLIT.json` for every split found below `source` and say what was found.

    Category ids are 1, 2, ... in the order of the classes, image and annotation ids 1, 2, ... in the order of the
    files. Nothing is written if anything is wrong.

    Args:
        kind: `voc` or `yolo`.
        source: folder of the data set.
        target: folder for the files; made if it is missing.
        class_names: text file with a class name per line; empty: as the reader finds them.
        keep_difficult: (VOC) difficult objects become common ones, not crowd.
        voc_first_pixel: (VOC) number of the first pixel, 1 or 0.

    Returns:
        per split the new file, the folder that its `file_name`s are relative to, and the name of the split.

    Raises:
        UserError: a file that is missing, broken or contradicts another; a file that is there already.
    """
    from datasets.convert_voc import read_voc
    from datasets.convert_yolo import read_yolo

    if not source.is_dir():
        raise UserError(f"--convert_data {kind} {source}: this is not a folder")
    findings = Findings()
    names = read_name_file(Path(class_names)) if class_names else None
    if kind == "voc":
        names, splits = read_voc(source, findings, names, keep_difficult=keep_difficult, first_pixel=voc_first_pixel)
    else:
        names, splits = read_yolo(source, findings, names)
    paths = [(target / f"instances_{split.name}.json", split.folder, split.name) for split in splits]
    for path, _, _ in paths:
        if path.exists():
            raise UserError(f"{path} exists already and is not replaced: delete it, or give another --output_dir")
    contents = [as_coco(split, names, findings) for split in splits]
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {target} cannot be made: {error}") from error
    for (path, _, _), content in zip(paths, contents):
        _write(content, path)
        empty = len(content["images"]) - len({a["image_id"] for a in content["annotations"]})
        dist.info(
            f"wrote {path}: {len(content['images'])} images ({empty} without objects), "
            f"{len(content['annotations'])} objects"
        )
    dist.info(f"{len(names)} classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
    for line in findings.sentences():
        dist.info(line)
    return paths


def as_coco(split: Split, names: Sequence[str], findings: Findings) -> dict[str, Any]:
    """Return a split in COCO's format; boxes are clipped to their images, those without area left out and counted."""
    numbers = {name: number for number, name in enumerate(names, start=1)}
    images, annotations = [], []
    for image_id, picture in enumerate(split.pictures, start=1):
        images.append(
            {"id": image_id, "file_name": picture.file_name, "width": picture.width, "height": picture.height}
        )
        for thing in picture.things:
            box = clipped(thing.box, picture, findings)
            if box is None:
                continue
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": numbers[thing.name],
                "bbox": [round(value, DIGITS) for value in box],
                "area": round(box[2] * box[3], DIGITS),
                "iscrowd": 0,
            }
            annotations.append(annotation | thing.more)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def clipped(box: Sequence[float], picture: Picture, findings: Findings) -> tuple[float, float, float, float] | None:
    """Return the part of an (x1, y1, x2, y2) box inside its image as (x, y, width, height); None if there is none."""
    x1, x2 = (min(max(value, 0.0), float(picture.width)) for value in box[0::2])
    y1, y2 = (min(max(value, 0.0), float(picture.height)) for value in box[1::2])
    if x2 <= x1 or y2 <= y1:
        findings.add("boxes without area inside their image, left out", picture.file_name)
        return None
    if max(abs(new - old) for new, old in zip((x1, y1, x2, y2), box)) > ROUNDING:
        findings.add("boxes that reach outside their image, clipped", picture.file_name)
    return x1, y1, x2 - x1, y2 - y1


def open_picture(folder: Path, file_name: str, findings: Findings) -> Picture:
    """Return an image without objects, its size from the head of its file.

    The training opens images as they are stored, not turned by their EXIF tag; images with such a tag are counted,
    because the program that made the boxes may have shown them turned.

    Raises:
        UserError: the file is missing or no image.
    """
    path = folder / file_name
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_TURN, 1) not in (0, 1)
    except FileNotFoundError as error:
        raise UserError(f"image file {path} does not exist") from error
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image file {path} cannot be read: {error}; replace it or take it out") from error
    if turned:
        findings.add(
            "images with an EXIF tag that asks to turn them, which the training does not; if their boxes were drawn on "
            "the turned image, save them turned first",
            str(path),
        )
    return Picture(file_name, width, height)


def list_images(folder: Path) -> list[str]:
    """Return the paths of all images below `folder`, relative to it, sorted."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def read_name_file(path: Path) -> list[str]:
    """Return the class names of a text file, one per line.

    Raises:
        UserError: no such file, an empty one, or a name that occurs twice.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    return checked_names(names, path)


def checked_names(names: list[str], path: Path) -> list[str]:
    """Return `names`; UserError if there are none, or one occurs twice."""
    if not names:
        raise UserError(f"{path} names no class")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} names the class {twice!r} more than once; names must differ")
    return names


def read_text(path: Path) -> str:
    """Return the text of a file, with or without a byte order mark; UserError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"file {path} cannot be read as UTF-8 text: {error}") from error


def finite(text: str, where: str) -> float:
    """Return the number that `text` holds; UserError that begins with `where` if it is none."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {text!r} is not a finite number")
    return value


def _write(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from error
