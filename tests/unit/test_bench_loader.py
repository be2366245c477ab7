"""The benchmark of the loader: what it compares, what it prints, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from datasets.transforms import eval_transforms
from util import bench_loader
from util.bench_loader import LEVELS, OUR_WAY, PIL_WAY, difference, generated_files, load_batch
from util.benchmark import main

SMALL = ["loader", "--images", "3", "--repeats", "1", "--test_size", "64", "--augment", "none"]


def test_both_ways_are_timed_and_their_pixels_compared(tmp_path, capsys):
    assert main([*SMALL, "--output", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    for row in ("decode", "augment", "convert", "collate", "all", "images/s per core"):
        assert f"| {row} |" in said
    assert "the boxes are identical" in said and "3 JPEGs of" in said and f"torch: {torch.__version__[:4]}" in said
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["grey_levels"] <= LEVELS + 0.001 and stored["same_boxes"]
    for way in ("PIL", "tensors"):
        (parts,) = zip(*(stored["ms"][way][step] for step in bench_loader.STEPS))
        assert stored["ms"][way]["all"] == [pytest.approx(sum(parts))]
    (figure,) = stored["figures"]
    assert figure["plain"] == pytest.approx(3 * stored["ms"]["PIL"]["all"], rel=1e-3)
    assert figure["times_as_fast"][0] == pytest.approx(figure["plain"][0] / figure["ours"][0], rel=2e-3)
    assert {"processor", "cores", "load", "gpu"} <= stored["machine"].keys() and "torch" in stored["versions"]
    assert stored["ms"]["PIL"]["convert"] > [0] and stored["ms"]["tensors"]["convert"] == [0]


def test_the_images_of_a_folder_are_taken_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name, width in (("b/1.jpg", 10), ("a.JPEG", 20), ("c.jpg", 30)):
        Image.new("RGB", (width, 8)).save(tmp_path / name, "JPEG")
    (tmp_path / "notes.txt").touch()
    files = bench_loader.read_files(str(tmp_path), 2)
    assert [bench_loader.decode_rgb(content).shape[2] for content in files] == [20, 10]


def test_a_folder_without_images_is_an_error_that_names_the_flag(tmp_path, capsys):
    assert main(["loader", "--data", str(tmp_path)]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_way_with_other_pixels_fails(monkeypatch, capsys):
    brighter = replace(OUR_WAY, convert=lambda image: image.clamp(max=250) + 3)
    monkeypatch.setattr(bench_loader, "OUR_WAY", brighter)
    assert main(SMALL) == 1
    assert "the boxes are identical" in capsys.readouterr().out  # so it is the pixels that fail


def test_moved_boxes_are_noticed():
    transforms = eval_transforms(test_size=0, max_size=1)
    files = generated_files(1, (40, 60))
    batches = [load_batch(way, files, transforms, 0)[0] for way in (PIL_WAY, OUR_WAY)]
    assert difference(*batches)["same_boxes"]
    batches[1][1][0].boxes[0, 0] += 0.1
    assert not difference(*batches)["same_boxes"]


def test_an_unknown_benchmark_lists_the_known_ones(capsys):
    assert main(["lodaer"]) == main([]) == 2
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("loader      images/s per core") == 3


def test_a_number_below_one_is_refused(capsys):
    assert main(["loader", "--images", "0"]) == 2
    assert "--images 0: must be at least 1" in capsys.readouterr().err
