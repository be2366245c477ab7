"""`main.py --infer`: files in, detections and pictures out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import main
from tests.unit.infer_cases import SIZES, checkpoint, coco, eval_command, infer_command, noise
from util.args import get_args_parser
from util.errors import UserError
from util.infer import load
from util.infer_args import given_flags, thresholds
from util.infer_command import batches
from util.infer_files import FileNames, find_inputs, image_ids
from util.video import VideoReader

ALL = "--score_threshold 0"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return checkpoint(tmp_path_factory.mktemp("model") / "tiny.pth", "--topk 5")


def entries(folder: Path, name: str = "detections.json") -> list[dict]:
    return json.loads((folder / name).read_text())


def test_detections_are_those_of_the_evaluation_and_fit_the_annotation_file(file: Path, tmp_path: Path) -> None:
    annotations = coco(tmp_path)
    assert main.main(eval_command(file, annotations, tmp_path / "eval", "--topk 5")) == 0
    assert main.main(infer_command(file, tmp_path, output_dir=tmp_path / "out", more=ALL)) == 0
    found, expected = entries(tmp_path / "out"), entries(tmp_path / "eval" / "eval", "results.json")
    numbers = [{key: entry[key] for key in ("image_id", "category_id", "bbox", "score")} for entry in found]
    assert numbers == expected and len(found) > 6
    assert found[0]["file_name"] == str(tmp_path / "1.png")
    for truth in (annotations, tmp_path / "out" / "images.json"):
        loaded = COCO(str(truth)).loadRes(str(tmp_path / "out" / "detections.json"))
        assert len(loaded.anns) == len(found)
        assert {category["name"] for category in loaded.cats.values()} == {"kind 5", "kind 9"}


def test_every_image_gets_a_picture_an_entry_and_rows(file: Path, tmp_path: Path, capsys) -> None:
    coco(tmp_path)
    out = tmp_path / "out"
    assert main.main(infer_command(file, tmp_path / "*.png", output_dir=out, more=f"{ALL} --infer_csv")) == 0
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [(e["id"], e["width"], e["height"]) for e in listed] == [(i, *size) for i, size in SIZES.items()]
    for entry in listed:
        picture = Image.open(out / entry["picture"])
        assert picture.width / picture.height == pytest.approx(entry["width"] / entry["height"], abs=0.01)
    with (out / "detections.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    for row, entry in zip(rows, entries(out), strict=True):
        x, y, width, height = entry["bbox"]
        assert row["file"] == entry["file_name"] and row["frame"] == ""
        assert row["class"] == {5: "kind 5", 9: "kind 9"}[entry["category_id"]]
        sides = [float(row[side]) for side in ("x1", "y1", "x2", "y2")]
        assert sides == pytest.approx([x, y, x + width, y + height], abs=0.006)
    assert f"outputs are in {out}: detections.json, detections.csv, images.json, pictures/" in capsys.readouterr().out
    # A second run does not take the pictures of the first for images.
    assert main.main(infer_command(file, tmp_path, output_dir=out, more="--no-infer_draw")) == 0
    assert len(json.loads((out / "images.json").read_text())["images"]) == 3


def test_flags_of_use_win_over_the_checkpoint_and_flags_of_the_model_do_not(file: Path, tmp_path: Path, capsys) -> None:
    coco(tmp_path)
    command = infer_command(file, tmp_path / "3.png", output_dir=tmp_path / "out", more=f"{ALL} --no-infer_draw")
    assert main.main([*command, "--hidden_dim", "96", "--lr", "1"]) == 0
    assert f"--hidden_dim 96 is 64 in {file}, which decides" in capsys.readouterr().out
    assert len(entries(tmp_path / "out")) <= 5  # --topk 5 of the checkpoint
    assert main.main([*command, "--topk", "100"]) == 0  # the default, but given
    assert len(entries(tmp_path / "out")) > 5


def test_classes_and_thresholds_of_classes_can_be_chosen(file: Path, tmp_path: Path, capsys) -> None:
    coco(tmp_path)
    command = infer_command(file, tmp_path / "3.png", output_dir=tmp_path / "out", more="--no-infer_draw --topk 100")
    everything = load(file, "cpu", score_threshold=0, classes=["kind 9"], topk=100)(tmp_path / "3.png")
    middle = everything.scores[3].item()
    assert main.main([*command, "--infer_classes", "kind 9", "--score_threshold", "1", f"kind 9={middle}"]) == 0
    found = entries(tmp_path / "out")
    assert [entry["score"] for entry in found] == everything.scores[:4].tolist()
    assert {entry["category_id"] for entry in found} == {9}
    assert main.main([*command, "--infer_classes", "kind9"]) == 2
    assert "no class 'kind9'; did you mean 'kind 9'" in capsys.readouterr().err


def test_broken_images_are_named_and_the_others_done(file: Path, tmp_path: Path, capsys) -> None:
    noise(20, 20).save(tmp_path / "good.png")
    noise(90, 90).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    (tmp_path / "empty.png").touch()
    more = f"{ALL} --infer_batch_size 3"
    assert main.main(infer_command(file, tmp_path, output_dir=tmp_path / "out", more=more)) == 2
    printed = capsys.readouterr()
    assert "2 files could not be read" in printed.err and "cut.jpg" in printed.err and "empty.png" in printed.err
    assert "1 image or frame" in printed.out
    assert {entry["file_name"] for entry in entries(tmp_path / "out")} == {str(tmp_path / "good.png")}
    assert [path.name for path in (tmp_path / "out" / "pictures").iterdir()] == ["good.jpg"]


def test_a_file_name_that_is_no_utf8_keeps_its_bytes_in_the_table(file: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        noise(20, 20).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    command = infer_command(file, tmp_path, output_dir=tmp_path / "out", more=f"{ALL} --infer_csv")
    assert main.main(command) == 0
    assert b"caf\xe9.png,kind" in (tmp_path / "out" / "detections.csv").read_bytes()


def test_a_folder_that_cannot_be_written_to_is_an_error(file: Path, tmp_path: Path, capsys) -> None:
    noise(20, 20).save(tmp_path / "good.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pictures").touch()
    assert main.main(infer_command(file, tmp_path, output_dir=tmp_path / "out")) == 2
    assert "out: cannot write there" in capsys.readouterr().err


def test_images_of_the_same_name_get_pictures_and_ids_of_their_own(file: Path, tmp_path: Path, capsys) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        picture = noise(20, 30)
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(tmp_path / part / "1.jpg", exif=exif)
    assert main.main(infer_command(file, tmp_path, tmp_path / "a", output_dir=tmp_path / "out")) == 0
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert [(e["id"], e["picture"]) for e in listed] == [(1, "pictures/1.jpg"), (2, "pictures/1_2.jpg")]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 2
    assert "2 images with an EXIF tag" in capsys.readouterr().out


def test_folders_are_searched_to_the_bottom_and_patterns_are_followed(tmp_path: Path) -> None:
    for name in ("b/c/1.PNG", "a.jpg", "b/clip.mp4", "b/.hidden.png", ".git/x.png", "notes.txt", "out/pictures/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_inputs([str(tmp_path), str(tmp_path / "a.jpg")], tmp_path / "out")
    assert found.images == [tmp_path / "a.jpg", tmp_path / "b/c/1.PNG"] and not found.videos
    assert found.left_out == {tmp_path / "b/clip.mp4"}
    found = find_inputs([str(tmp_path / "**" / "*"), str(tmp_path / "notes.txt")], tmp_path / "out")
    assert found.videos == [tmp_path / "b/clip.mp4"] and not found.left_out
    assert found.images == [tmp_path / "a.jpg", tmp_path / "b/c/1.PNG", tmp_path / "notes.txt"]  # named: it is tried
    (tmp_path / "odd[1].png").touch()
    assert find_inputs([str(tmp_path / "odd[1].png")], tmp_path).images == [tmp_path / "odd[1].png"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("gone", "no such file or folder"), ("x/*.png", "no such file"), ("full", "without images; give its 1 videos")],
)
def test_a_name_that_stands_for_nothing_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "clip.mp4").touch()
    with pytest.raises(UserError, match=message):
        find_inputs([str(tmp_path / name)], tmp_path / "out")


def test_ids_are_the_numbers_of_the_files_or_count_from_one() -> None:
    assert image_ids([Path("a/000139.jpg"), Path("b/7.png")], only_images=True) == [139, 7]
    assert image_ids([Path("a/7.jpg"), Path("b/007.png")], only_images=True) == [1, 2]
    assert image_ids([Path("a/7.jpg"), Path("cat.png")], only_images=True) == [1, 2]
    assert image_ids([Path("a/7.jpg")], only_images=False) == [1]
    names = FileNames()
    assert [names.take(stem) for stem in ("x", "X", "x_2", "x")] == ["x", "X_2", "x_2_2", "x_3"]


def clip(path: Path, frames: int = 5, rate: int = 10) -> Path:
    """Write a video of noise, 48 x 33 pixels."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 48, 33, "bgr0"
        for number in range(frames):
            picture = np.asarray(noise(48, 33, seed=number))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_every_frame_of_a_video_is_an_image(file: Path, tmp_path: Path, capsys) -> None:
    av = pytest.importorskip("av")
    path, out = clip(tmp_path / "clip.mkv"), tmp_path / "out"
    noise(20, 20).save(tmp_path / "77.png")
    more = f"{ALL} --infer_batch_size 2 --infer_csv"
    assert main.main(infer_command(file, path, tmp_path / "77.png", output_dir=out, more=more)) == 0
    listed = json.loads((out / "images.json").read_text())["images"]
    assert [e["id"] for e in listed] == [1, 2, 3, 4, 5, 6]
    assert [(e["frame"], e["seconds"]) for e in listed[1:]] == [(0, 0), (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    expected = load(file, "cpu", score_threshold=0)(noise(48, 33, seed=3))
    scores = [e["score"] for e in entries(out) if e.get("frame") == 3]
    assert scores == pytest.approx(expected.scores.tolist(), abs=1e-6)
    with av.open(str(out / "videos" / "clip.mp4")) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 10
    assert len(pictures) == 5 and pictures[0].size == (560, 384)
    assert (out / "detections.csv").read_text().splitlines()[-1].endswith(",4")
    assert "clip.mkv [5/5]" in capsys.readouterr().out


def test_a_video_that_breaks_off_gives_what_was_there(file: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    av = pytest.importorskip("av")
    path, out = clip(tmp_path / "clip.mkv", frames=3), tmp_path / "out"
    (tmp_path / "text.mp4").write_text("hello")

    def broken(reader: VideoReader):
        yield from reader._container.decode(video=0)
        raise av.error.InvalidDataError(1, "Invalid data found")

    monkeypatch.setattr(VideoReader, "_decoded", broken)
    more = f"{ALL} --infer_batch_size 2"
    assert main.main(infer_command(file, path, tmp_path / "text.mp4", output_dir=out, more=more)) == 2
    errors = capsys.readouterr().err
    assert "clip.mkv breaks off after 3 frames: Invalid data found" in errors and "text.mp4 cannot be read" in errors
    assert {entry["frame"] for entry in entries(out)} == {0, 1, 2}
    with av.open(str(out / "videos" / "clip.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3


def test_videos_of_turned_phones_are_turned_as_players_do(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "phone.mp4"
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :16] = 255  # bright on the left, which players show at the top
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content, plain = path.read_bytes(), struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    place = content.index(plain, content.index(b"tkhd"))  # the matrix of the track: a quarter turn clockwise
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(content[:place] + turn + content[place + len(plain) :])
    (frame,) = VideoReader(path)
    assert frame.pixels.shape == (64, 32, 3)
    assert frame.pixels[:16].mean() > 240 and frame.pixels[16:].mean() < 15


def test_videos_without_their_package_are_an_error_with_the_way_out(file: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").touch()
    assert main.main(infer_command(file, tmp_path / "clip.mp4", output_dir=tmp_path / "out")) == 2
    assert "pip install av" in capsys.readouterr().err


def test_batches_end_before_an_error() -> None:
    def items():
        yield from (1, 2, 3)
        raise UserError("broken off")

    taken = []
    with pytest.raises(UserError, match="broken off"):
        for batch in batches(items(), 2):
            taken.append(batch)
    assert taken == [[1, 2], [3]]
    assert list(batches(range(4), 2)) == [[0, 1], [2, 3]] and list(batches([], 2)) == []


def test_a_file_without_arguments_works_with_flags_of_the_model(file: Path, tmp_path: Path, capsys) -> None:
    torch.save(torch.load(file)["model"], tmp_path / "bare.pth")
    noise(30, 30).save(tmp_path / "a.png")
    command = infer_command(tmp_path / "bare.pth", tmp_path / "a.png", output_dir=tmp_path / "out", more=ALL)
    assert main.main(command) == 2
    assert "does not say how its model is built" in capsys.readouterr().err
    flags = eval_command(file, tmp_path / "x.json", tmp_path / "out")
    flags = [flag for flag in flags[: flags.index("--val_images")] if flag not in ("--num_classes", "4")]
    assert main.main([*command, *flags]) == 0
    assert {entry["category_id"] for entry in entries(tmp_path / "out")} <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--infer a.jpg --output_dir out", "--infer needs --resume"),
        ("--infer a.jpg --resume a.pth", "--infer needs --output_dir"),
        ("--infer a.jpg --resume auto --output_dir out", "name the checkpoint itself"),
        ("--infer a.jpg --resume a.pth --output_dir out --eval", "--infer and --eval are different things"),
        ("--infer a.jpg --resume a.pth --output_dir out --score_threshold 0.3 1.2", "--score_threshold 1.2"),
        ("--infer a.jpg --resume a.pth --output_dir out --infer_batch_size 0", "must be at least 1"),
    ],
)
def test_flags_that_cannot_work_are_refused(words: str, message: str, capsys) -> None:
    assert main.main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_thresholds_are_a_number_and_numbers_by_class() -> None:
    assert thresholds(["0.5", "a=b=0.2", "traffic light=1"]) == (0.5, {"a=b": 0.2, "traffic light": 1.0})
    assert thresholds(["cat=0.2"]) == (0.3, {"cat": 0.2})
    for wrong in (["x"], ["=0.5"], ["0.2", "0.3"], ["cat=2"], ["nan"]):
        with pytest.raises(UserError, match="--score_threshold"):
            thresholds(wrong)


def test_given_flags_are_told_from_defaults() -> None:
    words = "--topk 100 --no-clip_boxes --num_queries 5 --use_fp16"
    assert given_flags(get_args_parser(), words.split()) == {"topk", "clip_boxes", "num_queries_one2one", "amp"}


def test_real_images_fit_their_annotation_file(file: Path, tmp_path: Path, shared_data: Path) -> None:
    names = ["000000000086.jpg", "000000000009.jpg"]  # the first is greyscale
    for name in names:
        shutil.copy(shared_data / "coco128" / "images" / name, tmp_path)
    assert main.main(infer_command(file, tmp_path, output_dir=tmp_path / "out", more=f"{ALL} --num_workers 1")) == 0
    assert {entry["image_id"] for entry in entries(tmp_path / "out")} == {9, 86}
    truth = COCO(str(next((shared_data / "coco128" / "annotations").glob("*train*.json"))))
    assert {9, 86} <= set(truth.imgs)
    assert len(truth.loadRes(str(tmp_path / "out" / "detections.json")).anns) == len(entries(tmp_path / "out"))
    for entry in json.loads((tmp_path / "out" / "images.json").read_text())["images"]:
        assert (entry["width"], entry["height"]) == tuple(truth.imgs[entry["id"]][side] for side in ("width", "height"))
