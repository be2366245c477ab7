"""YOLO folders: an image folder and a label folder per split, a text file per image, class names in a file.

A line of a label file is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` for a polygon; numbers but the class are
shares of the width and height of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.convert import (
    DIGITS,
    Findings,
    Picture,
    Split,
    Thing,
    checked_names,
    finite,
    list_images,
    open_picture,
    read_name_file,
    read_text,
)
from datasets.yaml_names import read_yaml_names
from util.errors import UserError

# Folder of the images of a split, and of its labels; `valid` is how some exports call val.
LAYOUTS = ("{0}/{1}", "{1}/{0}")
SPLITS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
NAME_FILES = ("classes.txt", "obj.names", "labels/classes.txt", "labels/train/classes.txt")
FAR_OUTSIDE = 2.0  # a share above this is a number of pixels
NO_LABELS = {"classes.txt"}  # text files that labelling programs leave between the label files


def read_yolo(source: Path, findings: Findings, names: Sequence[str] | None = None) -> tuple[list[str], list[Split]]:
    """Return the class names and the splits of a YOLO folder.

    Folders are `images/SPLIT` and `labels/SPLIT`, or `SPLIT/images` and `SPLIT/labels`. An image without a label file
    has no objects. A polygon gives the box around it and stays as `segmentation`.

    Args:
        source: folder of the data set.
        findings: takes what there is to say.
        names: classes in their order; None: of the one .yaml file in `source`, or of classes.txt.

    Raises:
        UserError: names the file, and the line of a label file.
    """
    names = list(names) if names is not None else _names(source)
    splits = []
    for split, words in SPLITS.items():
        folders = _folders(source, words)
        if folders is not None:
            splits.append(_read_split(split, *folders, names, findings))
    if not splits:
        raise UserError(
            f"{source} has neither images/train, images/val and labels/train, labels/val, nor train/images, val/images "
            "and train/labels, val/labels; move the files so (a list of image paths is not read)"
        )
    if not any(picture.things for split in splits for picture in split.pictures):
        raise UserError(f"no image of {source} has a label file with an object; are the names of both the same?")
    return names, splits


def _names(source: Path) -> list[str]:
    yamls = sorted([*source.glob("*.yaml"), *source.glob("*.yml")])
    if (preferred := source / "data.yaml") in yamls:
        yamls = [preferred]
    if len(yamls) > 1:
        raise UserError(
            f"{source} has {', '.join(path.name for path in yamls)}: name the classes with --class_names FILE, a text "
            "file with one per line"
        )
    if yamls:
        return checked_names(read_yaml_names(yamls[0]), yamls[0])
    path = next((source / name for name in NAME_FILES if (source / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{source} has neither data.yaml nor classes.txt: name the classes with --class_names FILE, a text file "
            "with one per line"
        )
    return read_name_file(path)


def _folders(source: Path, words: Sequence[str]) -> tuple[Path, Path] | None:
    for layout in LAYOUTS:
        for word in words:
            images = source / layout.format("images", word)
            if images.is_dir():
                return images, source / layout.format("labels", word)
    return None


def _read_split(split: str, images: Path, labels: Path, names: Sequence[str], findings: Findings) -> Split:
    if not labels.is_dir():
        raise UserError(f"{images} has no label folder: {labels} is missing")
    pictures, used = [], set()
    for file_name in list_images(images):
        picture = open_picture(images, file_name, findings)
        path = labels / Path(file_name).with_suffix(".txt")
        if path in used:
            raise UserError(f"two images of {images} have the label file {path}: one of them has to go")
        used.add(path)
        if path.is_file():
            picture.things = _read_labels(path, picture, names, findings)
        else:
            findings.add("images without a label file, taken as images without objects", str(images / file_name))
        pictures.append(picture)
    if not pictures:
        raise UserError(f"{images} has no image")
    for path in sorted(labels.rglob("*.txt")):
        if path not in used and path.name not in NO_LABELS:
            findings.add("label files without an image, not used", str(path))
    return Split(split, images, pictures)


def _read_labels(path: Path, picture: Picture, names: Sequence[str], findings: Findings) -> list[Thing]:
    """Return the objects of a label file, boxes in pixels and not clipped yet."""
    things = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{path}, line {number}"
        polygon = len(words) >= 7 and len(words) % 2 == 1
        if len(words) != 5 and not polygon:
            raise UserError(
                f"{where} has {len(words)} numbers; it must be `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...`"
            )
        name = names[_label(words[0], names, where)]
        values = [finite(word, where) for word in words[1:]]
        if max(map(abs, values)) > FAR_OUTSIDE:
            raise UserError(f"{where}: {max(values, key=abs):g} is not a share of the image's size, from 0 to 1")
        if polygon:
            things.append(_from_polygon(name, values, picture, findings))
            continue
        cx, cy, w, h = values
        x, y, w, h = cx * picture.width, cy * picture.height, w * picture.width, h * picture.height
        things.append(Thing(name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
    return things


def _label(word: str, names: Sequence[str], where: str) -> int:
    value = finite(word, where)
    if value != int(value) or not 0 <= value < len(names):
        raise UserError(f"{where} has the class {word}; the {len(names)} classes are 0 to {len(names) - 1}")
    return int(value)


def _from_polygon(name: str, values: Sequence[float], picture: Picture, findings: Findings) -> Thing:
    """Return the object with a polygon of shares x1, y1, x2, y2, ...; its corners are moved to the image's border."""
    inside = [min(max(value, 0.0), 1.0) for value in values]
    if any(abs(a - b) > 1e-6 for a, b in zip(inside, values)):
        findings.add("polygons that reach outside their image, clipped", picture.file_name)
    xs = [value * picture.width for value in inside[0::2]]
    ys = [value * picture.height for value in inside[1::2]]
    twice = sum(x * after_y - after_x * y for x, y, after_x, after_y in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1]))
    points = [round(value, DIGITS) for point in zip(xs, ys) for value in point]
    more = {"segmentation": [points], "area": round(abs(twice) / 2, DIGITS)}
    return Thing(name, (min(xs), min(ys), max(xs), max(ys)), more)
