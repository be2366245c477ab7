"""Pascal VOC and YOLO folders become COCO's format: boxes by hand-computed values, mistakes named with their file."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

import main
from datasets.annotations import mend_coco
from datasets.coco import CocoDetection
from datasets.convert import convert
from datasets.transforms import eval_transforms
from util.errors import UserError

WIDTH, HEIGHT = 40, 20


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), turned: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.new("RGB", size).save(path, exif=exif)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def thing(name: str, *corners: object, more: str = "") -> str:
    tags = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{name}</name>{more}<bndbox>{tags}</bndbox></object>"


def voc(root: Path, objects: str = "", size: tuple[int, int] = (WIDTH, HEIGHT), name: str = "a") -> Path:
    """Write a VOC folder with one training image and its XML."""
    image(root / "JPEGImages" / f"{name}.png")
    sizes = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    xml = f"<annotation><filename>wrong.jpg</filename>{sizes}{objects}</annotation>"
    write(root / "Annotations" / f"{name}.xml", xml)
    write(root / "ImageSets" / "Main" / "train.txt", f"{name}\n")
    return root


def yolo(root: Path, lines: str, names: str = "names: [cat, dog]\n") -> Path:
    """Write a YOLO folder with one training image and its labels."""
    image(root / "images" / "train" / "a.png")
    write(root / "labels" / "train" / "a.txt", lines)
    write(root / "data.yaml", names)
    return root


def converted(kind: str, source: Path, split: str = "train", **flags) -> dict:
    target = source.parent / "out"
    convert(kind, source, target, **flags)
    content = json.loads((target / f"instances_{split}.json").read_text())
    assert mend_coco(copy.deepcopy(content), target) == [], "nothing is left to mend"
    return content


def boxes(content: dict) -> list[list[float]]:
    return [annotation["bbox"] for annotation in content["annotations"]]


# Pascal VOC


def test_voc_corners_are_the_first_and_last_pixel_counted_from_1(tmp_path: Path) -> None:
    # pixels 1 to 10 across and 3 to 8 down: 10 x 6 pixels that begin at the edges 0 and 2
    content = converted("voc", voc(tmp_path / "voc", thing("cat", 1, 3, 10, 8) + thing("cat", 40, 20, 40, 20)))
    assert boxes(content) == [[0, 2, 10, 6], [39, 19, 1, 1]]
    assert [a["area"] for a in content["annotations"]] == [60, 1]
    assert content["images"] == [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}]


def test_voc_corners_counted_from_0_are_edges_as_they_stand(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", thing("cat", 0, 3, 10, "8.5"))
    assert boxes(converted("voc", source, voc_first_pixel=0)) == [[0, 3, 10, 5.5]]


def test_a_voc_box_from_pixel_0_on_is_clipped_and_the_flag_is_named(tmp_path: Path, capsys) -> None:
    assert boxes(converted("voc", voc(tmp_path / "voc", thing("cat", 0, 1, 50, 8)))) == [[0, 0, 40, 8]]
    said = capsys.readouterr().out
    assert "add --voc_first_pixel 0: 1 (the first: " in said and "a.xml" in said
    assert "boxes that reach outside their image, clipped: 1 (the first: a.png)" in said


def test_boxes_without_area_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    objects = thing("cat", 5, 5, 4, 9) + thing("cat", 41, 5, 60, 9) + thing("cat", 2, 2, 3, 3)
    content = converted("voc", voc(tmp_path / "voc", objects))
    assert boxes(content) == [[1, 1, 2, 2]] and content["annotations"][0]["id"] == 1
    assert "boxes without area inside their image, left out: 2 (the first: a.png)" in capsys.readouterr().out


@pytest.mark.parametrize(("keep", "crowd"), [(False, [1, 0]), (True, [0, 0])])
def test_difficult_voc_objects_are_crowd_unless_they_are_kept(tmp_path: Path, keep: bool, crowd: list[int]) -> None:
    hard = "<difficult>1</difficult><truncated>1</truncated>"
    easy = "<difficult>0</difficult><truncated>0</truncated>"
    objects = thing("cat", 1, 1, 2, 2, more=hard) + thing("cat", 1, 1, 2, 2, more=easy)
    first, second = converted("voc", voc(tmp_path / "voc", objects), keep_difficult=keep)["annotations"]
    assert [first["iscrowd"], second["iscrowd"]] == crowd
    assert first["difficult"] == first["truncated"] == 1 and "difficult" not in second


def test_voc_classes_are_sorted_or_in_the_order_of_the_name_file(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", thing("dog", 1, 1, 2, 2) + thing("ant", 1, 1, 2, 2))
    categories = converted("voc", source)["categories"]
    assert categories == [{"id": 1, "name": "ant"}, {"id": 2, "name": "dog"}]
    write(tmp_path / "names.txt", "dog\ncat\nant\n")
    (tmp_path / "out" / "instances_train.json").unlink()
    content = converted("voc", source, class_names=str(tmp_path / "names.txt"))
    assert [c["name"] for c in content["categories"]] == ["dog", "cat", "ant"]
    assert [a["category_id"] for a in content["annotations"]] == [1, 3]


def test_boxes_of_parts_are_not_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    content = converted("voc", voc(tmp_path / "voc", thing("person", 3, 3, 8, 8, more=part)))
    assert boxes(content) == [[2, 2, 6, 6]] and [c["name"] for c in content["categories"]] == ["person"]


def test_every_voc_list_becomes_a_file_and_images_without_xml_stay_as_empty_ones(tmp_path: Path, capsys) -> None:
    source = voc(tmp_path / "voc", thing("cat", 1, 1, 2, 2))
    image(source / "JPEGImages" / "b.jpg", (8, 6))
    write(source / "ImageSets" / "Main" / "val.txt", "b.jpg\n")
    write(source / "ImageSets" / "Main" / "cat_train.txt", "a  1\n")
    content = converted("voc", source, split="val")
    assert content["images"] == [{"id": 1, "file_name": "b.jpg", "width": 8, "height": 6}]
    assert content["annotations"] == [] and [c["name"] for c in content["categories"]] == ["cat"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["instances_train.json", "instances_val.json"]
    assert "images without an XML file, taken as images without objects: 1 (the first: b in " in capsys.readouterr().out


BROKEN_VOC = {
    "cut off": ("<annotation><object>", r"a\.xml cannot be read, is it cut off\?"),
    "no name": (f"<annotation>{thing(' ', 1, 1, 2, 2)}</annotation>", r"a\.xml: an object has no <name>"),
    "no box": (f"<annotation>{thing('cat', 1, 1, 2)}</annotation>", r"a\.xml: the object 'cat' has no <ymax>"),
    "no number": (f"<annotation>{thing('cat', 1, 1, 2, 'x')}</annotation>", r"a\.xml: <ymax>: 'x' is not a finite"),
    "nothing": ("<annotation></annotation>", "no XML file in .* has an object"),
}


@pytest.mark.parametrize("case", BROKEN_VOC)
def test_a_broken_xml_file_is_named(tmp_path: Path, case: str) -> None:
    source, (text, message) = voc(tmp_path / "voc"), BROKEN_VOC[case]
    write(source / "Annotations" / "a.xml", text)
    with pytest.raises(UserError, match=message):
        convert("voc", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_voc_size_that_is_not_the_image_s_is_refused_and_zeros_are_not(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", thing("cat", 1, 1, 2, 2), size=(HEIGHT, WIDTH))
    with pytest.raises(UserError, match=r"a\.xml says 20 x 40, a\.png is 40 x 20"):
        convert("voc", source, tmp_path / "out")
    assert boxes(converted("voc", voc(tmp_path / "voc", thing("cat", 1, 1, 2, 2), size=(0, 0)))) == [[0, 0, 2, 2]]


def test_voc_lists_are_checked_against_the_images(tmp_path: Path) -> None:
    source = voc(tmp_path / "voc", thing("cat", 1, 1, 2, 2))
    lists = source / "ImageSets" / "Main" / "train.txt"
    for text, message in [("a\nb\n", "lists b, but"), ("a\na\n", "lists a more than once"), ("\n", "is empty")]:
        write(lists, text)
        with pytest.raises(UserError, match=message):
            convert("voc", source, tmp_path / "out")
    lists.unlink()
    with pytest.raises(UserError, match=r"has none of train\.txt, val\.txt"):
        convert("voc", source, tmp_path / "out")


# YOLO


def test_yolo_boxes_are_shares_of_the_image_around_a_centre(tmp_path: Path) -> None:
    # centre (20, 10), size 10 x 10: from (15, 5); centre (4, 5), size 8 x 5: from (0, 2.5)
    content = converted("yolo", yolo(tmp_path / "yolo", "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.25 0.2 0.25\n"))
    assert boxes(content) == [[15, 5, 10, 10], [0, 2.5, 8, 5]]
    assert [a["category_id"] for a in content["annotations"]] == [2, 1]
    assert [a["id"] for a in content["annotations"]] == [1, 2] and content["annotations"][0]["area"] == 100
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


def test_a_yolo_polygon_gives_the_box_around_it_its_area_and_itself(tmp_path: Path) -> None:
    # the triangle (4, 2), (20, 2), (4, 12): box 16 x 10, half of it covered
    content = converted("yolo", yolo(tmp_path / "yolo", "0 0.1 0.1 0.5 0.1 0.1 0.6\n"))
    (annotation,) = content["annotations"]
    assert annotation["bbox"] == [4, 2, 16, 10] and annotation["area"] == 80
    assert annotation["segmentation"] == [[4, 2, 20, 2, 4, 12]]


def test_yolo_boxes_and_polygons_outside_the_image_are_clipped_and_counted(tmp_path: Path, capsys) -> None:
    lines = "0 0 0.5 0.5 0.5\n0 1.2 0.5 0.1 0.1\n0 0.5 0.5 0 0.1\n0 -0.1 0 0.5 0 0.5 0.5\n0 0.5 0.5 1 1\n"
    content = converted("yolo", yolo(tmp_path / "yolo", lines))
    assert boxes(content) == [[0, 5, 10, 10], [0, 0, 20, 10], [0, 0, 40, 20]]
    said = capsys.readouterr().out
    assert "boxes that reach outside their image, clipped: 1 (" in said
    assert "boxes without area inside their image, left out: 2 (" in said
    assert "polygons that reach outside their image, clipped: 1 (" in said


def test_yolo_images_without_label_file_or_with_an_empty_one_stay(tmp_path: Path, capsys) -> None:
    source = yolo(tmp_path / "yolo", "0 0.5 0.5 0.5 0.5\n")
    image(source / "images" / "val" / "b.png")
    image(source / "images" / "val" / "deep" / "c.JPG")
    write(source / "labels" / "val" / "b.txt", "")
    write(source / "labels" / "val" / "lost.txt", "0 0.5 0.5 0.5 0.5\n")
    write(source / "labels" / "val" / "classes.txt", "cat\n")
    content = converted("yolo", source, split="val")
    assert [i["file_name"] for i in content["images"]] == ["b.png", "deep/c.JPG"] and not content["annotations"]
    said = capsys.readouterr().out
    assert "images without a label file, taken as images without objects: 1 (the first: " in said
    assert "label files without an image, not used: 1 (the first: " in said and "lost.txt" in said
    assert "instances_val.json: 2 images (2 without objects), 0 objects" in said


def test_folders_of_splits_may_hold_images_and_labels_and_valid_is_val(tmp_path: Path) -> None:
    source = tmp_path / "yolo"
    for split in ("train", "valid"):
        image(source / split / "images" / "a.png")
        write(source / split / "labels" / "a.txt", "0 0.5 0.5 0.5 0.5\n")
    write(source / "classes.txt", "cat\n")
    assert boxes(converted("yolo", source, split="val")) == [[10, 5, 20, 10]]


BROKEN_YOLO = {
    "2 0.5 0.5 0.5 0.5": "a.txt, line 1 has the class 2; the 2 classes are 0 to 1",
    "0.5 0.5 0.5 0.5 0.5": "a.txt, line 1 has the class 0.5",
    "\n0 0.5 0.5 0.5": "a.txt, line 2 has 4 numbers",
    "0 0.5 0.5 0.5 0.5 0.9": "a.txt, line 1 has 6 numbers",
    "0 0.5 nan 0.5 0.5": "a.txt, line 1: 'nan' is not a finite number",
    "0 20 10 10 10": "a.txt, line 1: 20 is not a share of the image's size",
    "": "no image of .* has a label file with an object",
}


@pytest.mark.parametrize("line", BROKEN_YOLO)
def test_a_broken_yolo_line_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=BROKEN_YOLO[line]):
        convert("yolo", yolo(tmp_path / "yolo", line), tmp_path / "out")


def test_missing_yolo_folders_and_names_are_named(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", "0 0.5 0.5 0.5 0.5")
    write(source / "other.yml", "")
    (source / "data.yaml").rename(source / "mine.yaml")
    with pytest.raises(UserError, match=r"has mine\.yaml, other\.yml: name the classes with --class_names"):
        convert("yolo", source, tmp_path / "out")
    (source / "mine.yaml").unlink()
    (source / "other.yml").unlink()
    with pytest.raises(UserError, match=r"has neither data\.yaml nor classes\.txt"):
        convert("yolo", source, tmp_path / "out")
    write(source / "classes.txt", "cat\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt names the class 'cat' more than once"):
        convert("yolo", source, tmp_path / "out")
    write(source / "classes.txt", "cat\n")
    (source / "labels").rename(source / "label")
    with pytest.raises(UserError, match=r"has no label folder: .*labels/train is missing"):
        convert("yolo", source, tmp_path / "out")
    (source / "images").rename(source / "pictures")
    with pytest.raises(UserError, match="has neither images/train"):
        convert("yolo", source, tmp_path / "out")


# both


def test_images_that_are_broken_or_to_be_turned_are_named(tmp_path: Path, capsys) -> None:
    source = yolo(tmp_path / "yolo", "0 0.5 0.5 0.5 0.5")
    image(source / "images" / "train" / "b.jpg", turned=True)
    assert converted("yolo", source)["images"][1]["width"] == WIDTH, "as stored, which is how images are loaded"
    assert "save them turned first: 1 (the first: " in capsys.readouterr().out
    write(source / "images" / "train" / "c.jpg", "no image")
    with pytest.raises(UserError, match=r"c\.jpg cannot be read"):
        convert("yolo", source, tmp_path / "second")


def test_files_that_are_there_are_not_replaced(tmp_path: Path) -> None:
    source = yolo(tmp_path / "yolo", "0 0.5 0.5 0.5 0.5")
    convert("yolo", source, tmp_path / "out")
    with pytest.raises(UserError, match=r"instances_train\.json exists already and is not replaced"):
        convert("yolo", source, tmp_path / "out")


def run(*words: object) -> int:
    return main.main([str(word) for word in words])


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_the_command_writes_files_that_the_training_loads(tmp_path: Path, capsys, kind: str) -> None:
    source = {"voc": voc, "yolo": yolo}[kind](
        tmp_path / kind, thing("cat", 16, 6, 25, 15) if kind == "voc" else "0 0.5 0.5 0.25 0.5"
    )
    assert run("--convert_data", kind, source, "--output_dir", tmp_path / "out") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("flags for training: "))
    _, folder, _, path = line.removeprefix("flags for training: ").split()
    dataset = CocoDetection(folder, path, transforms=eval_transforms(test_size=0, max_size=WIDTH))
    assert dataset.load(0)[1]["boxes"].tolist() == [[15, 5, 25, 15]] and dataset.class_names[0] == "cat"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--convert_data", "coco", "x", "--output_dir", "y"], "the formats are voc and yolo"),
        (["--convert_data", "voc", "x"], "--convert_data needs --output_dir"),
        (["--convert_data", "voc", "nowhere", "--output_dir", "y"], "nowhere: this is not a folder"),
        (["--convert_data", "yolo", "x", "--output_dir", "y", "--keep_difficult"], "belong to --convert_data voc"),
        (["--class_names", "x"], "--class_names belongs to --convert_data"),
        (["--convert_data", "voc", "x", "--output_dir", "y", "--strip", "z"], "leave out --eval"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words: Sequence[str], message: str, capsys) -> None:
    assert run(*words) == 2
    assert message in capsys.readouterr().err
