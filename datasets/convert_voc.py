"""Pascal VOC folders: `Annotations/NAME.xml`, `JPEGImages/NAME.jpg`, `ImageSets/Main/{train,val,...}.txt`.

VOC counts pixels from 1 and its corners are the first and the last pixel inside the box (development kit, section
"Annotation"): xmin 1, xmax 10 are the ten pixels from edge 0 to edge 10. So edges are (xmin - 1, ymin - 1, xmax, ymax).
Tools that write edges counted from 0 into VOC files are read with `first_pixel=0`: corners as they stand.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from datasets.convert import IMAGE_ENDINGS, Findings, Picture, Split, Thing, finite, open_picture, read_text
from util.errors import UserError

SPLITS = ("train", "val", "trainval", "test")
SHOWN = 5


def read_voc(
    source: Path,
    findings: Findings,
    names: Sequence[str] | None = None,
    *,
    keep_difficult: bool = False,
    first_pixel: int = 1,
) -> tuple[list[str], list[Split]]:
    """Return the class names and the splits of a VOC folder.

    An image is found by the name in the list, never by the `filename` in its XML, which tools leave wrong. An image
    without an XML file has no objects. Difficult objects get `iscrowd` 1: the evaluation then neither asks for them nor
    counts a detection of them as wrong, as VOC's does, and they are no training targets. The fields `difficult` and
    `truncated` are kept where they are 1.

    Args:
        source: folder of the data set.
        findings: takes what there is to say.
        names: classes in their order; None: those that occur, sorted.
        keep_difficult: difficult objects get `iscrowd` 0.
        first_pixel: 1 as in VOC, 0 for edges counted from 0.

    Raises:
        UserError: names the file.
    """
    lists, images, annotations = _parts(source)
    files = _images_by_name(images)
    splits, other_sizes, with_xml = [], [], 0
    for split, path in lists.items():
        pictures = []
        for name in _listed(path):
            if name not in files:
                raise UserError(f"{path} lists {name}, but {images} has no image of this name")
            picture = open_picture(images, files[name], findings)
            xml = annotations / f"{name}.xml"
            if xml.is_file():
                with_xml += 1
                other_sizes += _read_objects(xml, picture, names, findings, keep_difficult, first_pixel)
            else:
                findings.add("images without an XML file, taken as images without objects", f"{name} in {path}")
            pictures.append(picture)
        splits.append(Split(split, images, pictures))
    if not with_xml:
        raise UserError(f"none of the listed images has an XML file in {annotations}")
    if other_sizes:
        raise UserError(
            f"{len(other_sizes)} XML files have another size than their image, so the boxes are of another image: "
            f"{'; '.join(other_sizes[:SHOWN])}. Mend the files or take the images out of the lists"
        )
    found = sorted({thing.name for split in splits for picture in split.pictures for thing in picture.things})
    if not found:
        raise UserError(f"no XML file in {annotations} has an object")
    return list(names or found), splits


def _parts(source: Path) -> tuple[dict[str, Path], Path, Path]:
    """Return the lists by split and the folders of images and annotations, once all are there."""
    images, annotations, main = source / "JPEGImages", source / "Annotations", source / "ImageSets" / "Main"
    for folder in (images, annotations):
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: a VOC folder has JPEGImages, Annotations and ImageSets/Main")
    lists = {name: main / f"{name}.txt" for name in SPLITS}
    lists = {name: path for name, path in lists.items() if path.is_file()}
    if not lists:
        raise UserError(
            f"{main} has none of {', '.join(f'{name}.txt' for name in SPLITS)}; write them: the name of an image per "
            "line, without folder and ending"
        )
    return lists, images, annotations


def _images_by_name(folder: Path) -> dict[str, str]:
    """Return the file names of the images in `folder` by name without ending."""
    files: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_ENDINGS:
            continue
        if path.stem in files:
            raise UserError(f"{folder} has {files[path.stem]} and {path.name}: one of them has to go")
        files[path.stem] = path.name
    return files


def _listed(path: Path) -> list[str]:
    """Return the names in a list of images, without endings of images, in the order of the list."""
    names = []
    for line in read_text(path).splitlines():
        name = line.strip()
        ending = next((e for e in IMAGE_ENDINGS if name.lower().endswith(e)), "")
        if name:
            names.append(name[: len(name) - len(ending)])
    if not names:
        raise UserError(f"{path} is empty: write the name of an image per line, or delete the file")
    twice = next((name for name, after in zip(sorted(names), sorted(names)[1:]) if name == after), None)
    if twice is not None:
        raise UserError(f"{path} lists {twice} more than once")
    return names


def _read_objects(
    path: Path,
    picture: Picture,
    names: Sequence[str] | None,
    findings: Findings,
    keep_difficult: bool,
    first_pixel: int,
) -> list[str]:
    """Add the objects of an XML file to `picture`; return what is wrong with its size, nothing or one sentence."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read, is it cut off? ({error})") from error
    for thing in root.findall("object"):  # not iter(): the parts of a person have boxes of their own
        name = (thing.findtext("name") or "").strip()
        if not name:
            raise UserError(f"{path}: an object has no <name>")
        if names is not None and name not in names:
            raise UserError(f"{path}: the class {name!r} is not in --class_names; it knows {', '.join(names[:12])}")
        corners = [_corner(thing, key, path) for key in ("xmin", "ymin", "xmax", "ymax")]
        if first_pixel == 1 and min(corners[:2]) < 1:
            findings.add(
                "boxes that begin at pixel 0: if corners are counted from 0, add --voc_first_pixel 0", str(path)
            )
        box = (corners[0] - first_pixel, corners[1] - first_pixel, corners[2], corners[3])
        more = {key: 1 for key in ("difficult", "truncated") if _is_set(thing, key)}
        if "difficult" in more and not keep_difficult:
            findings.add("difficult objects, written as crowd (--keep_difficult: as common objects)", str(path))
            more["iscrowd"] = 1
        picture.things.append(Thing(name, box, more))
    said = [root.findtext(f"size/{key}") for key in ("width", "height")]
    size = [int(finite(text, str(path))) if text and text.strip() else 0 for text in said]
    if min(size) > 0 and size != [picture.width, picture.height]:
        return [f"{path} says {size[0]} x {size[1]}, {picture.file_name} is {picture.width} x {picture.height}"]
    return []


def _corner(thing: ElementTree.Element, key: str, path: Path) -> float:
    text = thing.findtext(f"bndbox/{key}")
    if text is None:
        raise UserError(f"{path}: the object {thing.findtext('name')!r} has no <{key}> in a <bndbox>")
    return finite(text, f"{path}: <{key}>")


def _is_set(thing: ElementTree.Element, key: str) -> bool:
    return (thing.findtext(key) or "0").strip() not in ("0", "")
