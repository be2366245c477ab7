"""What people do every day, once on photographs: COCO's images and blood cells, with a model too small to be good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from pycocotools.coco import COCO

from main import main
from tests.cli import run

DATA = "--dataset_file coco --num_workers 0 --test_size 96 --max_size 160 --augment flip --num_queries 60"
PHOTOS = 4


def sample(folder: Path, target: Path) -> str:
    """Write the first images of both files of a data set as JSON files, and return the flags that name them."""
    words = []
    for part in ("train", "val"):
        content = json.loads((folder / "annotations" / f"instances_{part}.json").read_text())
        content["images"] = content["images"][:PHOTOS]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (target / f"{part}.json").write_text(json.dumps(content))
        words.append(f"--{part}_images {folder / 'images'} --{part}_json {target / f'{part}.json'}")
    return " ".join(words)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, shared_data: Path) -> str:
    """Flags of a few images of COCO."""
    return f"{DATA} {sample(shared_data / 'coco128', tmp_path_factory.mktemp('photos'))}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, photos: str) -> Path:
    """A run of one epoch on them, with the pictures of assignments and the curves of the evaluation."""
    folder = tmp_path_factory.mktemp("trained")
    more = "--epochs 1 --plot_assignment 1 --eval_curves --draw 2 --with_box_refine --two_stage"
    assert run(folder, f"{photos} {more}") == 0
    return folder


def is_picture(path: Path, least: int = 100) -> bool:
    with Image.open(path) as image:
        return min(image.size) >= least


def test_a_training_leaves_assignments_curves_and_confusions(trained: Path) -> None:
    (assignment,) = (trained / "assignment").glob("image_*.png")
    names = ["eval/pr_curves.png", "eval/confusion.png", "ap.png", "loss.png"]
    assert all(is_picture(path) for path in (assignment, *(trained / name for name in names)))
    assert len((trained / "eval" / "thresholds.csv").read_text().splitlines()) > 80  # one line per class


def test_a_report_shows_the_images_of_the_run(trained: Path) -> None:
    assert main(["--report", str(trained), "--report_images", "2"]) == 0
    page = (trained / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 2 and "person" in page


def test_runs_are_drawn_together(trained: Path, tmp_path: Path) -> None:
    assert main(["--plot", str(trained), "--output_dir", str(tmp_path)]) == 0
    assert is_picture(tmp_path / "ap.png")


def test_a_detector_is_used_on_a_folder(trained: Path, tmp_path: Path, shared_data: Path) -> None:
    names = [str(shared_data / "coco128" / "images" / f"0000000000{number}.jpg") for number in ("09", "86")]
    command = ["--infer", *names, "--resume", str(trained / "checkpoint.pth"), "--device", "cpu"]
    assert main([*command, "--output_dir", str(tmp_path), "--score_threshold", "0"]) == 0
    truth = COCO(str(tmp_path / "images.json"))
    assert set(truth.imgs) == {9, 86} and truth.loadRes(str(tmp_path / "detections.json")).anns
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_an_exported_graph_agrees_on_photographs(trained: Path, tmp_path: Path, shared_data: Path, capsys) -> None:
    image = str(shared_data / "coco128" / "images" / "000000000009.jpg")
    command = ["--export", "torch", "--export_size", "128", "160", "--export_images", image]
    assert main([*command, "--resume", str(trained / "checkpoint.pth"), "--output_dir", str(tmp_path)]) == 0
    assert "PASS" in capsys.readouterr().out and (tmp_path / "model.pt2").is_file()


def test_a_batch_of_photographs_is_tried_by_heart(photos: str, tmp_path: Path, capsys) -> None:
    assert run(tmp_path, f"{photos} --overfit_batch --overfit_steps 3") == 1  # three steps are not enough
    assert "FAIL" in capsys.readouterr().out and is_picture(tmp_path / "overfit.png")


def test_blood_cells_start_from_weights_of_other_classes(trained: Path, tmp_path: Path, shared_data: Path) -> None:
    cells = sample(shared_data / "bccd", tmp_path)
    more = f"{DATA} {cells} --epochs 1 --with_box_refine --two_stage --init_from {trained}/checkpoint.pth"
    assert run(tmp_path / "tuned", f"{more} --init_class_rows") == 0
    (entry,) = (json.loads(line) for line in (tmp_path / "tuned" / "log.txt").read_text().splitlines())
    assert entry["test_images"] == PHOTOS
