"""A detector from its checkpoint alone: the same detections as `--eval`, whatever form the image has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from tests.mmdet_file import mmdet_state
from tests.tiny import TWO_STAGE, tiny_args
from tests.unit.infer_cases import checkpoint, coco, eval_command, noise
from util.errors import UserError
from util.infer import Predictor, load, read_image
from util.strip import strip_file

EVERYTHING = {"device": "cpu", "score_threshold": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images with annotations and the checkpoint `tiny.pth`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("infer")
    coco(folder)
    checkpoint(folder / "tiny.pth")
    return folder


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return load(folder / "tiny.pth", **EVERYTHING)


def as_rows(found) -> list[tuple]:
    """Return (category id, bbox, score) as COCO results have them."""
    boxes = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in found.boxes.double().tolist()]
    return list(zip(found.category_ids, boxes, found.scores.double().tolist()))


@pytest.mark.parametrize("more", ["", "--nms_iou 0.3 --topk 5", "--augment lsj --lsj_size 64"])
def test_an_image_gives_the_detections_of_the_evaluation(folder: Path, tmp_path: Path, more: str) -> None:
    file = checkpoint(tmp_path / "other.pth", more)
    assert main.main(eval_command(file, folder / "instances.json", tmp_path / "out", more)) == 0
    expected = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert len(expected) > 3
    predictor = load(file, **EVERYTHING)
    found = [(i, *row) for i in (1, 2, 3) for row in as_rows(predictor(folder / f"{i}.png"))]
    assert found == [(e["image_id"], e["category_id"], e["bbox"], e["score"]) for e in expected]


def test_detections_have_the_documented_types(predictor: Predictor, folder: Path) -> None:
    found = predictor(folder / "2.png")
    count = len(found)
    assert count == len(found.names) == len(found.category_ids) > 2
    assert found.boxes.shape == (count, 4) and found.boxes.dtype == found.scores.dtype == torch.float32
    assert found.labels.dtype == torch.int64 and found.size == (60, 25) and found.masks is None
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert [predictor.class_names[i] for i in found.labels] == found.names
    assert [predictor.category_ids[i] for i in found.labels] == found.category_ids
    assert set(found.category_ids) == {5, 9}  # outputs that stand for no category are never reported


def test_paths_pictures_arrays_and_tensors_are_the_same_image(predictor: Predictor, folder: Path) -> None:
    path = folder / "1.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    forms = [str(path), path, picture, array, torch.from_numpy(array.copy()).permute(2, 0, 1)]
    first, *others = (as_rows(predictor(form)) for form in forms)
    assert all(other == first for other in others)


def test_a_list_of_images_gives_a_list(predictor: Predictor, folder: Path) -> None:
    paths = [folder / f"{i}.png" for i in (1, 2, 3)]
    alone = [as_rows(predictor(path)) for path in paths]
    assert [as_rows(found) for found in predictor(paths)] == alone
    together = predictor(paths, batch_size=2)  # the smaller image is padded, so its scores are others
    assert [found.size for found in together] == [(30, 40), (60, 25), (64, 64)]
    assert predictor([]) == []
    same_size = [noise(50, 40, seed) for seed in (1, 2, 3)]
    for found, image in zip(predictor(same_size, batch_size=3), same_size, strict=True):
        assert torch.allclose(found.scores, predictor(image).scores, atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "I;16"])
def test_every_kind_of_picture_is_read_as_rgb(predictor: Predictor, tmp_path: Path, mode: str) -> None:
    picture = noise(30, 20).convert("L")
    if mode == "I;16":
        deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        assert deep.mode == mode
        deep.save(tmp_path / "a.png")
    else:
        picture.convert(mode).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert pixels.shape == (3, 20, 30) and pixels.dtype == torch.uint8
    if mode != "1":
        assert (pixels.int() - torch.from_numpy(np.asarray(picture).copy()).int()).abs().max() <= 1
    assert predictor(tmp_path / "a.png").size == (20, 30)


def test_grey_of_16_bits_is_read_alike_where_pil_calls_it_i() -> None:
    picture = Image.fromarray(np.array([[0, 255, 256, 65535]], np.int32))
    picture.format = "PNG"
    assert picture.mode == "I" and read_image(picture)[0].tolist() == [[0, 0, 1, 255]]


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)])
def test_tiny_images_and_strips_work(predictor: Predictor, size: tuple[int, int]) -> None:
    found = predictor(noise(*size))
    assert found.size == size[::-1] and found.boxes.isfinite().all() and len(found) > 0


def test_an_exif_tag_does_not_turn_an_image(predictor: Predictor, tmp_path: Path) -> None:
    picture = noise(40, 20)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert predictor(tmp_path / "turned.jpg").size == (20, 40)
    assert predictor(Image.open(tmp_path / "turned.jpg")).size == (20, 40)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), torch.zeros(4, 4, 3, dtype=torch.uint8), 7],
)
def test_arrays_that_are_no_image_are_refused(image) -> None:
    with pytest.raises(ValueError, match=r"an image (has uint8 pixels|is a path)"):
        read_image(image)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match=r"text.png cannot be read: empty, or no image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(UserError, match=r"gone.png cannot be read: No such file"):
        read_image(tmp_path / "gone.png")


def test_thresholds_hold_for_all_classes_or_for_one(folder: Path, predictor: Predictor) -> None:
    everything = predictor(folder / "3.png")
    scores = {n: [s for s, m in zip(everything.scores.tolist(), everything.names) if m == n] for n in everything.names}
    middle = sorted(scores["kind 9"])[len(scores["kind 9"]) // 2]
    some = load(folder / "tiny.pth", "cpu", score_threshold=0.0, class_thresholds={"kind 9": middle})(folder / "3.png")
    kept = sum(score >= np.float32(middle) for score in scores["kind 9"])
    assert 0 < kept < len(scores["kind 9"])
    assert some.names.count("kind 9") == kept and some.names.count("kind 5") == len(scores["kind 5"])
    high = load(folder / "tiny.pth", "cpu", score_threshold=1.0)(folder / "3.png")
    assert len(high) == 0 and high.boxes.shape == (0, 4)


def test_only_the_wanted_classes_are_reported(folder: Path, predictor: Predictor) -> None:
    found = load(folder / "tiny.pth", **EVERYTHING, classes=["kind 9"])(folder / "3.png")
    assert as_rows(found) == [row for row in as_rows(predictor(folder / "3.png")) if row[0] == 9]


@pytest.mark.parametrize("options", [{"classes": ["Kind9"]}, {"class_thresholds": {"Kind9": 0.5}}])
def test_an_unknown_class_gets_the_known_ones_and_a_guess(folder: Path, options: dict) -> None:
    with pytest.raises(UserError, match=r"no class 'Kind9'; did you mean 'kind 9'.*Its classes: kind 5, kind 9$"):
        load(folder / "tiny.pth", "cpu", **options)


def test_sizes_and_topk_can_be_chosen(folder: Path) -> None:
    predictor = load(folder / "tiny.pth", **EVERYTHING, topk=1, test_size=96, max_size=120)
    prepared = predictor.transform(folder / "2.png")
    assert prepared.pixels.shape == (3, 120, 50) and prepared.covered == prepared.size == (60, 25)
    assert len(predictor(folder / "2.png")) <= 1


def test_parts_that_only_training_needs_are_not_built(tmp_path: Path) -> None:
    schemes = "--num_queries_one2many 6 --k_one2many 2 --aux_heads atss"
    predictor = load(checkpoint(tmp_path / "schemes.pth", schemes), **EVERYTHING)
    assert list(predictor.model.groups) == ["one2one"] and not predictor.model.training
    assert len(predictor(noise(50, 40))) > 0


def test_a_stripped_file_of_a_run_that_drew_assignments_is_used(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "drawn.pth", "--num_queries_one2many 6 --k_one2many 2 --plot_assignment 2")
    predictor = load(strip_file(str(file)), **EVERYTHING)
    assert list(predictor.model.groups) == ["one2one"]


def test_the_averaged_weights_can_be_taken(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    average = {"model": torch.load(checkpoint(tmp_path / "b.pth"))["model"], "updates": 3}
    both = checkpoint(tmp_path / "both.pth", ema=average)
    name = "class_embed.0.weight"
    for averaged, state in ((True, average["model"]), (False, torch.load(both)["model"])):
        model = load(both, "cpu", averaged=averaged).model
        assert torch.equal(dict(model.state_dict())[name], state[name])
    with pytest.raises(UserError, match="holds no averaged weights"):
        load(folder / "tiny.pth", "cpu", averaged=True)


def test_a_file_without_arguments_needs_the_flags_of_the_model(tmp_path: Path) -> None:
    torch.save({"state_dict": mmdet_state(classes=80)}, tmp_path / "co.pth")
    with pytest.raises(UserError, match=r"does not say how its model is built.*--infer PATH --resume \S+co.pth"):
        load(tmp_path / "co.pth", "cpu")
    args = tiny_args(f"{TWO_STAGE} --mixed_selection --test_size 96")
    args.num_classes = None
    predictor = load(tmp_path / "co.pth", **EVERYTHING, args=args)
    assert predictor.class_names[15] == "cat" and predictor.category_ids[15] == 17
    assert len(predictor(noise(40, 40))) > 0


def test_classes_that_no_file_names_are_numbered(tmp_path: Path) -> None:
    file = checkpoint(tmp_path / "bare.pth", without=("class_names", "category_ids"))
    predictor = load(file, "cpu")
    assert predictor.class_names == ["class 0", "class 1", "class 2", "class 3"]
    assert predictor.category_ids == [0, 1, 2, 3]


def test_drawn_boxes_are_where_they_were_found(predictor: Predictor, folder: Path) -> None:
    grey = Image.new("RGB", (100, 100), (90, 90, 90))
    found = predictor(grey)
    drawn = np.asarray(predictor.draw(grey, found)).astype(int)
    assert (drawn.max(2) - drawn.min(2) > 60).any()
    assert len(set(predictor.colors.values())) == len(predictor.categories()) == 2
