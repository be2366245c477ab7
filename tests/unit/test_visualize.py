"""Drawn detections: the right boxes at the right places, whatever the image is like."""

import contextlib
import io
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from util.structures import Detections
from util.visualize import GAP, SHORTEST, draw_detections

GREY = 90
NAMES = {3: "cat", 7: "dog"}


def dataset(images: list[Image.Image], boxes: list[list[tuple]]) -> SimpleNamespace:
    """Image ids are 10, 11, ...; a box is (category id, x, y, width, height[, iscrowd])."""
    ids = [10 + index for index in range(len(images))]
    annotations = []
    for image_id, rows in zip(ids, boxes):
        for category, x, y, w, h, *crowd in rows:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": [x, y, w, h]}
                | {"area": w * h, "iscrowd": int(bool(crowd))}
            )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": im.width, "height": im.height} for i, im in zip(ids, images)],
        "annotations": annotations,
        "categories": [{"id": category, "name": name} for category, name in NAMES.items()],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return SimpleNamespace(
        coco=coco,
        image_ids=ids,
        class_names=["cat", "dog", "N/A"],
        category_ids=[3, 7, -1],
        load_image=lambda index: images[index],
    )


def detections(image_id: int, *rows: tuple) -> Detections:
    """A row is (score, label, x0, y0, x1, y1)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:], image_id)


def plain(width: int = 128, height: int = 128, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), GREY if mode == "L" else (GREY,) * 3)


def coloured(path: Path) -> np.ndarray:
    """Return (H, W) bool of the pixels that are neither grey image nor title: boxes and labels."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return pixels.max(2) - pixels.min(2) > 60


def halves(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return `coloured` of the ground-truth side and of the detections' side."""
    found = coloured(path)
    middle = found.shape[1] // 2
    return found[:, :middle], found[:, middle:]


def test_truth_is_drawn_left_and_detections_right_at_their_places(tmp_path: Path) -> None:
    data = dataset([plain()], [[(3, 16, 64, 32, 32)]])
    path, _ = draw_detections(data, [detections(10, (0.9, 1, 64, 64, 96, 96))], tmp_path)
    scale = SHORTEST / 128
    title = Image.open(path).height - SHORTEST
    for side, x in zip(halves(path), (16, 64)):
        # Bottom edges: no label is near them. The right half starts half a gap before its image.
        row = side[title + round(96 * scale)]
        drawn = np.flatnonzero(row)
        left = round(x * scale) + (GAP // 2 if x == 64 else 0)
        assert abs(drawn[0] - left) <= 2
        assert abs(drawn[-1] - (left + 32 * scale)) <= 2


def test_detections_below_the_threshold_are_left_out(tmp_path: Path) -> None:
    data = dataset([plain()], [[]])
    found = [detections(10, (0.29, 0, 20, 20, 90, 90))]
    hidden, _ = draw_detections(data, found, tmp_path / "high")
    shown, _ = draw_detections(data, found, tmp_path / "low", score_threshold=0.2)
    assert not coloured(hidden).any()
    assert halves(shown)[1].any()


def test_an_image_without_objects_and_detections_is_drawn_without_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = draw_detections(dataset([plain()], [[]]), [detections(10)], tmp_path)
    assert [path.name for path in paths] == ["image_10.png", "overview.png"]
    assert not coloured(paths[0]).any()


def test_greyscale_images_get_coloured_boxes(tmp_path: Path) -> None:
    data = dataset([plain(mode="L")], [[(3, 16, 64, 32, 32)]])
    path, _ = draw_detections(data, [detections(10)], tmp_path)
    assert halves(path)[0].any()


@pytest.mark.parametrize("box", [(-50, -50, 500, 500), (40, 40, 40, 40), (200, 200, 300, 300), (90, 90, 20, 20)])
def test_boxes_outside_empty_or_inverted_are_drawn_at_the_border(tmp_path: Path, box: tuple) -> None:
    path, _ = draw_detections(dataset([plain()], [[]]), [detections(10, (0.9, 0, *box))], tmp_path)
    assert halves(path)[1].any()


def test_boxes_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    found = detections(10, (0.9, 0, 10, 10, float("nan"), 50))
    path, _ = draw_detections(dataset([plain()], [[]]), [found], tmp_path)
    assert not coloured(path).any()


def test_a_category_has_the_same_colour_on_both_sides(tmp_path: Path) -> None:
    data = dataset([plain()], [[(7, 16, 64, 32, 32)]])
    path, _ = draw_detections(data, [detections(10, (0.9, 1, 16, 64, 48, 96))], tmp_path)
    pixels = np.asarray(Image.open(path))
    middle = pixels.shape[1] // 2
    row = round(96 * SHORTEST / 128) + pixels.shape[0] - SHORTEST
    x = round(32 * SHORTEST / 128)
    assert (pixels[row, x] == pixels[row, middle + GAP // 2 + x]).all()
    assert coloured(path)[row, x]


def test_labels_without_a_category_can_be_drawn(tmp_path: Path) -> None:
    path, _ = draw_detections(dataset([plain()], [[]]), [detections(10, (0.9, 2, 20, 20, 90, 90))], tmp_path)
    empty, _ = draw_detections(dataset([plain()], [[]]), [detections(10)], tmp_path / "empty")
    assert path.read_bytes() != empty.read_bytes()


def test_crowd_regions_are_drawn_and_marked(tmp_path: Path) -> None:
    with_crowd = dataset([plain()], [[(3, 16, 64, 32, 32, True)]])
    without = dataset([plain()], [[(3, 16, 64, 32, 32)]])
    marked, _ = draw_detections(with_crowd, [detections(10)], tmp_path / "crowd")
    unmarked, _ = draw_detections(without, [detections(10)], tmp_path / "plain")
    assert coloured(marked).sum() > coloured(unmarked).sum() + 100


def test_small_images_are_enlarged_and_large_ones_reduced(tmp_path: Path) -> None:
    data = dataset([plain(64, 96), plain(4000, 1000)], [[], []])
    small, large, _ = draw_detections(data, [detections(10), detections(11)], tmp_path)
    assert Image.open(small).width == 2 * SHORTEST + GAP
    assert Image.open(large).width == 2 * 1280 + GAP


def test_only_the_first_entries_are_drawn_and_the_overview_holds_them(tmp_path: Path) -> None:
    data = dataset([plain() for _ in range(4)], [[]] * 4)
    found = [detections(image_id) for image_id in (13, 11, 10, 12)]
    paths = draw_detections(data, found, tmp_path, limit=3)
    assert [path.name for path in paths] == ["image_13.png", "image_11.png", "image_10.png", "overview.png"]
    one = Image.open(draw_detections(data, found, tmp_path / "one", limit=1)[-1])
    sheet = Image.open(paths[-1])
    assert sheet.width > 2 * one.width
    assert sheet.height > 2 * one.height


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    assert draw_detections(dataset([plain()], [[]]), [], tmp_path) == []


def test_an_unknown_image_id_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image id 99"):
        draw_detections(dataset([plain()], [[]]), [detections(99)], tmp_path)
