"""`main.py --check_data`: what it reports is what the loader then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import util.check_data_plot
from datasets import build_dataset
from datasets.annotations import mend_coco, take_out_refused
from datasets.base import DetectionDataset
from main import main
from tests.unit.small_coco import HEIGHT, WIDTH, annotation, content, write
from util.args import get_args_parser
from util.check_data import check_command
from util.errors import UserError

NAN = float("nan")


@pytest.fixture(autouse=True)
def _no_histograms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than everything else."""
    if "pictures" not in request.function.__name__:
        monkeypatch.setattr(util.check_data_plot, "draw_histograms", lambda surveys, queries, path: path)


def objects() -> list[dict]:
    """Return an object on either image, one of each category."""
    return [annotation(1, 1, [0, 0, 10, 5], area=50.0), annotation(2, 2, [5, 5, 8, 8], category_id=9, area=64.0)]


def flags(folder: Path, *more: str) -> list[str]:
    """Return the command line for `train/` and `val/` of the folder, whose images stay as they are."""
    found = [f"--{part}_{kind}={folder / part / name}" for part in ("train", "val") for kind, name in NAMES.items()]
    quick = [
        "--augment=none",
        "--test_size=0",
        f"--output_dir={folder / 'out'}",
        "--num_workers=1",
        "--check_samples=0",
    ]
    return ["--check_data", *found, *quick, *more]


NAMES = {"images": "", "json": "instances.json"}


def check(folder: Path, train: dict | str, val: dict | str | None = None, *more: str) -> tuple[int, dict]:
    """Write both sets and check them; return the exit code and `data_report.json`."""
    val = content(objects()) if val is None else val
    for part, data in (("train", train), ("val", val)):
        (folder / part).mkdir(exist_ok=True)
        write(folder / part, data)
        if part == "val":  # another content than the images of the training set
            for path in (folder / part).glob("*.png"):
                Image.new("RGB", (WIDTH, HEIGHT), (200, 10, int(path.stem))).save(path)
    code = check_command(get_args_parser().parse_args(flags(folder, *more)))
    return code, json.loads((folder / "out" / "data_report.json").read_text())


def finding(report: dict, what: str, part: str = "train") -> dict:
    """Return the only finding whose text has `what` in it."""
    found = report["between"] if part == "both" else report["sets"][part]["findings"]
    matching = [f for f in found if what in f["what"]]
    assert len(matching) == 1, f"{what!r} in {[f['what'] for f in found]}"
    return matching[0]


def dataset(folder: Path, part: str = "train") -> DetectionDataset:
    """Return the set as training has it."""
    return build_dataset(part, get_args_parser().parse_args(flags(folder)))


# ---- a clean set ----


def test_a_clean_set_is_trainable_and_its_numbers_are_right(tmp_path, capsys):
    boxes = [[0, 0, 10, 5], [5, 5, 8, 8], [1, 1, 34, 28]]
    train = [annotation(i + 1, 1, box, area=box[2] * box[3]) for i, box in enumerate(boxes)]
    train.append(annotation(4, 2, [0, 0, 4, 4], category_id=9, area=16))
    code, report = check(tmp_path, content(train))
    numbers = report["sets"]["train"]
    assert code == 0 and report["trainable"] and numbers["findings"] == [] and report["between"] == []
    assert {key: numbers[key] for key in ("images", "annotations", "targets", "crowd_regions", "empty_images")} == {
        "images": 2, "annotations": 4, "targets": 4, "crowd_regions": 0, "empty_images": 0
    }  # fmt: skip
    assert numbers["sizes"] == {"small": 4, "medium": 0, "large": 0}  # 34 x 28 = 30.9 ** 2
    assert numbers["objects_per_image"]["most"] == 3 and numbers["fullest_image"] == 1
    assert [(c["name"], c["objects"], c["images"]) for c in numbers["classes"]] == [("kind 5", 3, 1), ("kind 9", 1, 1)]
    text = capsys.readouterr().out
    assert "objects of 2 classes: kind 5 3, kind 9 1" in text and "nothing odd" in text
    assert text.rstrip().endswith("TRAINABLE; of image files only the headers were read")


def test_the_exit_code_is_that_of_the_command_line(tmp_path, capsys):
    check(tmp_path, content(objects()))
    assert main(flags(tmp_path)) == 0
    (tmp_path / "train" / "2.png").unlink()
    assert main(flags(tmp_path)) == 1
    assert main(flags(tmp_path, "--eval", "--resume=a.pth")) == 2
    assert "--check_data looks at the data before a training: leave out --eval --resume" in capsys.readouterr().err


def test_one_set_alone_can_be_checked(tmp_path):
    check(tmp_path, content(objects()))
    only = [flag for flag in flags(tmp_path) if not flag.startswith("--val")]
    assert main(only) == 0
    assert list(json.loads((tmp_path / "out" / "data_report.json").read_text())["sets"]) == ["train"]


# ---- what the loader refuses ----


def image(**changes: object) -> Callable[[dict], object]:
    return lambda data: data["images"][1].update(changes)


def entry(**changes: object) -> Callable[[dict], object]:
    return lambda data: data["annotations"][1].update(changes)


REFUSED = {
    "annotations whose bbox is not four finite numbers": [entry(bbox=[1, 2, NAN, 3]), entry(bbox=[1, 2, 3])],
    "annotations whose category is not listed": [entry(category_id=7), entry(category_id=None)],
    "annotations whose iscrowd is neither 0 nor 1": [entry(iscrowd="0")],
    "images whose id is that of another one": [image(id=1)],
    "images whose width or height is no number of pixels": [image(width="40"), image(height=-3)],
    "images without a whole number as `id`, or without a `file_name`": [image(id="2"), image(file_name=None)],
    "categories whose id is that of another one": [lambda data: data["categories"].append(data["categories"][0])],
    "lists of categories that are empty": [lambda data: data.update(categories=[])],
}


@pytest.mark.parametrize(("what", "spoil"), [(what, spoil) for what, each in REFUSED.items() for spoil in each])
def test_what_is_called_refused_is_refused_with_the_message_in_the_report(tmp_path, what, spoil):
    data = content(objects())
    (tmp_path / "train").mkdir()
    write(tmp_path / "train", data)
    spoil(data)
    (tmp_path / "train" / "instances.json").write_text(json.dumps(data))
    code, report = check(tmp_path, json.dumps(data))
    assert code == 1 and not report["trainable"]
    found = [f for f in report["sets"]["train"]["findings"] if f["level"] == "refused"]
    assert [f["what"] for f in found] == [what] and found[0]["count"] == 1
    with pytest.raises(UserError) as error:
        dataset(tmp_path)
    assert found[0]["detail"] == str(error.value)


def test_all_faults_are_listed_at_once_and_the_rest_is_still_counted(tmp_path):
    bad = [annotation(i, 1, [0, 0, NAN, 4]) for i in range(10, 18)] + [annotation(18, 2, [0, 0, 4, 4], 77)]
    _, report = check(tmp_path, content([*objects(), *bad]))
    found = finding(report, "bbox is not")
    assert found["count"] == 8 and found["examples"] == ["10", "11", "12", "13", "14"]
    assert finding(report, "category is not listed")["examples"] == ["18"]
    assert report["sets"]["train"]["targets"] == 2


def test_what_is_left_without_the_faults_can_be_mended():
    data = content([*objects(), annotation(3, 1, [0, 0, NAN, 4]), annotation(4, 1, [0, 0, 4, 4], iscrowd=2)])
    data["images"] += [{"id": 1, "file_name": "again.png"}, {"id": 5, "file_name": "5.png", "width": "wide"}]
    assert len(take_out_refused(data, Path("a.json"))) == 4
    assert mend_coco(data, Path("a.json")) == []
    assert [a["id"] for a in data["annotations"]] == [1, 2] and [i["id"] for i in data["images"]] == [1, 2, 5]


def test_a_file_that_is_no_json_is_a_finding_too(tmp_path):
    code, report = check(tmp_path, "{")
    assert code == 1
    assert "is not valid JSON" in finding(report, "annotation file")["detail"]


def test_what_only_the_flags_make_wrong_is_told_in_the_words_of_the_loader(tmp_path):
    code, report = check(tmp_path, content(objects()), None, "--num_classes=1")
    assert code == 1
    assert finding(report, "train set")["detail"].startswith("--num_classes 1: these annotations need 2")


# ---- what the loader mends ----

MENDED = {
    "annotations whose id is 0": (entry(id=0), 2),
    "annotations whose id is that of another one": (entry(id=1), 2),
    "annotations whose id is no whole number": (entry(id="b"), 2),
    "annotations of images that are not listed": (entry(image_id=99), 1),
    "annotations without area": (entry(area=None), 2),
    "annotations without iscrowd": (entry(iscrowd=None), 2),
    "annotations whose box reaches outside the image": (entry(bbox=[30, 20, 20, 20]), 2),
    "annotations whose box has no area inside the image": (entry(bbox=[5, 5, 0, 4]), 1),
}


@pytest.mark.parametrize(("what", "spoil", "targets"), [(w, *rest) for w, rest in MENDED.items()])
def test_what_is_called_mended_is_mended(tmp_path, what, spoil, targets):
    data = content(objects())
    spoil(data)
    code, report = check(tmp_path, data)
    assert code == 0
    found = [f for f in report["sets"]["train"]["findings"] if f["level"] == "mended"]
    assert [(f["what"], f["count"]) for f in found] == [(what, 1)]
    loaded = dataset(tmp_path)
    samples = [loaded[i][1] for i in range(len(loaded))]
    assert report["sets"]["train"]["targets"] == sum(len(s["labels"]) for s in samples) == targets
    ids = sorted(loaded.coco.anns)
    assert (ids == list(range(1, len(ids) + 1))) or found[0]["action"] == "dropped"
    if "clipped" in found[0]["action"]:
        assert samples[1]["boxes"].tolist() == [[30, 20, WIDTH, HEIGHT]]


def test_negative_and_outside_boxes_are_no_targets(tmp_path):
    bad = [[5, 5, -3, 4], [WIDTH + 5, 5, 4, 4], [-9, 2, 9, 9]]
    _, report = check(tmp_path, content(objects() + [annotation(i + 3, 1, box) for i, box in enumerate(bad)]))
    assert finding(report, "no area inside the image")["examples"] == ["3", "4", "5"]
    assert len(dataset(tmp_path)[0][1]["labels"]) == 1


def test_a_box_that_only_the_image_file_shows_to_be_outside_is_reported(tmp_path):
    data = content([*objects(), annotation(3, 1, [WIDTH + 1, 0, 5, 5])])
    del data["images"][0]["width"]
    _, report = check(tmp_path, data)
    assert finding(report, "further annotations")["count"] == 1
    assert finding(report, "without width or height")["examples"] == ["1"]
    assert report["sets"]["train"]["targets"] == 2 and len(dataset(tmp_path)[0][1]["labels"]) == 1


# ---- what stays as it is ----


def test_copies_crowd_and_emptiness_are_reported_and_kept(tmp_path):
    copy, other = annotation(3, 1, [0, 0, 10, 5]), annotation(4, 1, [0, 0, 10, 5], category_id=9, area=0)
    crowd = annotation(5, 1, [0, 0, 30, 30], iscrowd=1)
    code, report = check(tmp_path, content([*objects(), copy, other, crowd], images=3, categories=(5, 9, 11)))
    assert code == 1  # only because of the third category, which validation does not have
    kept = {f["what"]: f["examples"] for f in report["sets"]["train"]["findings"]}
    assert kept == {
        "crowd regions": ["5"],
        "annotations with an area of 0 or less": ["4"],
        "annotations that repeat the box and category of another one": ["3"],
        "annotations that have the box of another one, in another category": ["4"],
        "categories without any object": ["11 kind 11"],
        "images without objects": ["3"],
    }
    assert len(dataset(tmp_path)[0][1]["labels"]) == 3  # both copies, without the crowd region


def test_more_objects_than_queries_are_told(tmp_path):
    many = [annotation(i, 1, [i, i, 5, 5]) for i in range(1, 7)]
    _, report = check(tmp_path, content(many), content(many), "--num_queries_one2one=5", "--topk=5")
    assert finding(report, "images with more than 5 objects")["action"].endswith("raise --num_queries_one2one")
    assert "--topk 5" in finding(report, "images with more than 5 objects", "val")["action"]


# ---- image files ----


def other_size(path: Path) -> None:
    Image.new("RGB", (HEIGHT, WIDTH)).save(path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-25])


SPOILT = {
    "image files that do not exist": Path.unlink,
    "image files that cannot be read": lambda path: path.write_text("no image"),
    "image files with another size than the annotation file says": other_size,
    "image files whose pixels cannot be decoded": cut_off,
}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("what", SPOILT)
def test_unusable_image_files_are_told_as_the_loader_tells_them(tmp_path, what, number):
    check(tmp_path, content(objects()))
    SPOILT[what](tmp_path / "train" / f"{number}.png")
    codes = {mode: main(flags(tmp_path, f"--check_images={mode}")) for mode in ("none", "sizes", "decode")}
    gone = what.endswith("exist") and number == 1  # the loader asks for the first file at once
    assert codes == {"none": int(gone), "sizes": int("decoded" not in what), "decode": 1}
    found = finding(json.loads((tmp_path / "out" / "data_report.json").read_text()), what)
    assert found["level"] == "refused" and found["examples"] == [f"{number}.png"]
    with pytest.raises(UserError) as error:
        dataset(tmp_path)[number - 1]
    told, raised = (
        text.partition(";")[0].partition(": cannot identify")[0] for text in (found["detail"], str(error.value))
    )
    assert told == raised


def test_when_no_image_is_there_the_folder_is_doubted(tmp_path):
    check(tmp_path, content(objects()))
    for number in (1, 2):
        (tmp_path / "train" / f"{number}.png").unlink()
    main(flags(tmp_path))
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    detail = finding(report, "image files that do not exist")["detail"]
    assert detail.endswith(f"Not one of the files is there: is {tmp_path / 'train'} the right folder?")


# ---- both sets ----


def test_categories_that_differ_are_refused_as_by_the_training(tmp_path):
    val = content([annotation(1, 1, [0, 0, 5, 5], category_id=5)], categories=(5, 8))
    code, report = check(tmp_path, content(objects()), val)
    found = finding(report, "not the same in both", "both")
    assert code == 1 and found["examples"] == ["8 kind 8", "9 kind 9"]
    assert "label 1 is (category id, name) (9, 'kind 9') in training" in found["detail"]


def test_objects_that_only_validation_has_cannot_be_learned(tmp_path):
    _, report = check(tmp_path, content(objects()[:1]))
    assert finding(report, "none in training", "both")["examples"] == ["9 kind 9"]


def test_an_image_that_is_in_both_sets_is_found_by_its_content(tmp_path):
    check(tmp_path, content(objects()))
    (tmp_path / "val" / "2.png").write_bytes((tmp_path / "train" / "1.png").read_bytes())
    assert main(flags(tmp_path)) == 0
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    found = finding(report, "in both sets", "both")
    assert found["examples"] == [f"{tmp_path / 'train' / '1.png'} = {tmp_path / 'val' / '2.png'}"]


def test_without_looking_at_files_the_same_path_is_the_same_image(tmp_path):
    check(tmp_path, content(objects()))
    same = [
        f.replace("val_images=" + str(tmp_path / "val"), "val_images=" + str(tmp_path / "train"))
        for f in flags(tmp_path)
    ]
    assert main([*same, "--check_images=none"]) == 0
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert finding(report, "in both sets", "both")["count"] == 2


# ---- pictures ----


def test_the_samples_are_those_of_the_first_epoch_with_their_augmentation(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("util.check_data.draw_batch", lambda *given: drawn.append(given) or tmp_path)
    boxes = [annotation(i, i, [0, 0, 10, 5]) for i in range(1, 5)]
    check(tmp_path, content(boxes, images=4), None, "--augment=flip", "--check_samples=3")
    images, ((titles, annotations),), path = drawn[0]
    assert len(images) == len(titles) == 3 and path.name == "data_targets.png"
    loaded = build_dataset("train", get_args_parser().parse_args(flags(tmp_path, "--augment=flip")))
    for title, boxes in zip(titles, annotations):
        number = int(title.split()[1].rstrip(","))
        _, sample = loaded[loaded.image_ids.index(number)]
        assert [a.box.tolist() for a in boxes] == [pytest.approx(b) for b in sample["boxes"].tolist()]
        assert boxes[0].text == "kind 5"
    assert {tuple(boxes[0].box.round().tolist()) for boxes in annotations} == {(0, 0, 10, 5), (30, 0, 40, 5)}


def test_pictures_are_written_and_a_missing_matplotlib_costs_only_the_histograms(tmp_path, monkeypatch, capsys):
    check(tmp_path, content(objects()), None, "--check_samples=2")
    names = ["data_report.json", "data_report.png", "data_targets.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with Image.open(tmp_path / "out" / "data_targets.png") as sheet:
        assert sheet.width > 2 * 400  # two samples side by side

    def nothing():
        raise UserError("curves need matplotlib: pip install matplotlib")

    (tmp_path / "out" / "data_report.png").unlink()
    monkeypatch.setattr(util.check_data_plot, "_pyplot", nothing)
    assert main(flags(tmp_path)) == 0
    assert "no histograms: curves need matplotlib: pip install matplotlib" in capsys.readouterr().out
    assert not (tmp_path / "out" / "data_report.png").exists()


# ---- other sets ----


def test_the_synthetic_set_is_fine(tmp_path, capsys):
    size = ["--synthetic_train=6", "--synthetic_val=3", "--synthetic_objects", "1", "2", "--synthetic_size", "32", "32"]
    assert main(["--check_data", "--dataset_file=synthetic", f"--output_dir={tmp_path}", *size]) == 0
    assert "synthetic train\n  6 images, 0 of them without objects; width 32 to 32" in capsys.readouterr().out


REAL = {  # (images, annotations, crowd, without objects, objects of a class) of the training part
    "coco128": (96, 725, 8, 2, ("person", 199)),
    "bccd": (291, 3847, 0, 0, ("RBC", 3247)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets_are_trainable_and_counted_right(shared_data, tmp_path, name):
    folder = shared_data / name
    found = [f"--{part}_images={folder / 'images'}" for part in ("train", "val")]
    found += [f"--{part}_json={folder / 'annotations' / f'instances_{part}.json'}" for part in ("train", "val")]
    assert main(["--check_data", *found, f"--output_dir={tmp_path}", "--check_samples=0"]) == 0
    report = json.loads((tmp_path / "data_report.json").read_text())
    n = report["sets"]["train"]
    images, annotations, crowd, empty, (label, count) = REAL[name]
    assert (n["images"], n["annotations"], n["crowd_regions"], n["empty_images"]) == (images, annotations, crowd, empty)
    assert {c["name"]: c["objects"] for c in n["classes"]}[label] == count
    assert n["targets"] == annotations - crowd
    if name == "coco128":
        assert finding(report, "images without objects")["examples"] == ["250", "508"]
