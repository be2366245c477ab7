"""Pasting objects of another image: pixels, masks and boxes by hand, and the masks of COCO-format files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torchvision import tv_tensors

from datasets import build_dataset, collate
from datasets.copy_paste import CopyPaste, boxes_from_masks
from datasets.lsj import LargeScaleJitter
from tests.unit.test_lsj import args_of, at_corner
from util.arg_rules import check_args
from util.errors import UserError

SIZE = (8, 10)


def grey(value: int) -> torch.Tensor:
    return torch.full((3, *SIZE), value, dtype=torch.uint8)


def sample_with(boxes: list[list[int]], labels: list[int], size: tuple[int, int] = SIZE) -> dict:
    """Return a sample whose masks fill their boxes (xyxy, pixels)."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size),
        "labels": torch.tensor(labels),
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "masks": tv_tensors.Mask(masks),
        "image_id": 1,
        "orig_size": size,
    }


def pasted(monkeypatch, mine: dict, other: dict, *, most: int = 100, keep_masks: bool = False):
    """Paste as many objects as allowed, in their order."""
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.full(shape, high - 1))
    monkeypatch.setattr(torch, "randperm", torch.arange)
    return CopyPaste(most, keep_masks=keep_masks)(grey(10), mine, grey(200), other | {"image_id": 2})


def test_a_pasted_object_brings_its_pixels_box_and_label(monkeypatch):
    image, sample = pasted(monkeypatch, sample_with([[0, 0, 3, 3]], [4]), sample_with([[5, 2, 9, 6]], [7]))
    assert sample["boxes"].tolist() == [[0, 0, 3, 3], [5, 2, 9, 6]] and sample["labels"].tolist() == [4, 7]
    assert sample["area"].tolist() == [9, 16] and sample["image_id"] == 1 and "masks" not in sample
    expected = grey(10)
    expected[:, 2:6, 5:9] = 200
    assert torch.equal(image, expected)


def test_a_partly_hidden_object_keeps_the_box_of_what_is_left_and_a_hidden_one_drops_out(monkeypatch):
    mine = sample_with([[0, 0, 6, 4], [4, 0, 6, 2]], [1, 2])
    _, sample = pasted(monkeypatch, mine, sample_with([[4, 0, 8, 4]], [3]), keep_masks=True)
    assert sample["boxes"].tolist() == [[0, 0, 4, 4], [4, 0, 8, 4]] and sample["labels"].tolist() == [1, 3]
    assert sample["area"].tolist() == [16, 16]
    assert sample["masks"].flatten(1).sum(1).tolist() == [16, 16]


def test_an_object_that_nothing_hides_keeps_its_annotated_box(monkeypatch):
    mine = sample_with([[0, 0, 3, 3]], [1])
    mine["boxes"][0, 2] = 3.5  # annotated a little wider than the mask
    _, sample = pasted(monkeypatch, mine, sample_with([[5, 2, 9, 6]], [7]))
    assert sample["boxes"][0].tolist() == [0, 0, 3.5, 3]


@pytest.mark.parametrize(("most", "labels"), [(1, [0, 5]), (2, [0, 5, 6]), (9, [0, 5, 6, 7])])
def test_at_most_so_many_objects_are_pasted(monkeypatch, most, labels):
    other = sample_with([[4, 4, 5, 5], [6, 4, 7, 5], [8, 4, 9, 5]], [5, 6, 7])
    _, sample = pasted(monkeypatch, sample_with([[0, 0, 2, 2]], [0]), other, most=most)
    assert sample["labels"].tolist() == labels


def test_every_number_of_objects_is_drawn():
    torch.manual_seed(0)
    other = sample_with([[4, 4, 5, 5], [6, 4, 7, 5]], [5, 6])
    found = {
        tuple(sorted(CopyPaste(9)(grey(1), sample_with([], []), grey(2), other)[1]["labels"].tolist()))
        for _ in range(60)
    }
    assert found == {(), (5,), (6,), (5, 6)}


def test_an_object_of_which_scaling_left_no_pixel_is_not_pasted(monkeypatch):
    other = sample_with([[5, 2, 9, 6], [0, 7, 2, 8]], [7, 8])
    other["masks"][0] = 0
    image, sample = pasted(monkeypatch, sample_with([[0, 0, 3, 3]], [4]), other)
    assert sample["labels"].tolist() == [4, 8] and int((image == 200).sum()) == 3 * 2


def test_an_image_without_objects_gets_some_and_gives_none(monkeypatch):
    full, empty = sample_with([[4, 4, 6, 6]], [5]), sample_with([], [])
    assert pasted(monkeypatch, empty, full)[1]["labels"].tolist() == [5]
    image, sample = pasted(monkeypatch, full, empty)
    assert sample["labels"].tolist() == [5] and torch.equal(image, grey(10))


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="equal sizes"):
        CopyPaste(1)(grey(1), sample_with([], []), torch.zeros(3, 4, 4, dtype=torch.uint8), sample_with([], []))


def test_boxes_of_masks_reach_to_the_outer_edges_of_their_pixels():
    sample = sample_with([[0, 0, 1, 1], [2, 3, 7, 5]], [1, 2])
    sample["masks"][0] = 0
    found = boxes_from_masks(sample)
    assert found["boxes"].tolist() == [[2, 3, 7, 5]] and found["labels"].tolist() == [2]


def test_a_crop_shrinks_boxes_to_what_it_leaves_of_the_mask(monkeypatch):
    # An L: a column at x 2..4 over rows 0..20 and a foot over x 2..20 in rows 18..20. The crop keeps rows 0..10.
    size = (20, 20)
    sample = sample_with([[2, 0, 20, 20]], [1], size)
    sample["masks"][0] = 0
    sample["masks"][0, :, 2:4] = 1
    sample["masks"][0, 18:, 2:] = 1
    at_corner(monkeypatch, last=False)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    _, cut = LargeScaleJitter(10, (2.0, 2.0))(image, sample)  # twice a fit in 10 x 10 is the image itself
    assert cut["boxes"].tolist() == [[2, 0, 4, 10]] and cut["area"].tolist() == [20]


# ---- from files ----

LSJ = "--augment lsj --lsj_size 48 --copy_paste 100 --train_images {0} --train_json {0}/train.json"


def write_set(folder: Path, segmentations: list[object]) -> None:
    """Write images of 20 x 30 pixels, one object each, all in the box x 4..14, y 2..12."""
    for i in range(len(segmentations)):
        Image.fromarray(np.full((20, 30, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    annotations = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [4, 2, 10, 10], "area": 100, "iscrowd": 0}
        | ({} if segmentation is None else {"segmentation": segmentation})
        for i, segmentation in enumerate(segmentations)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in range(len(segmentations))]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(json.dumps(content))


def square() -> np.ndarray:
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[2:12, 4:14] = 1
    return mask


def test_polygons_and_both_kinds_of_run_lengths_give_the_same_mask(tmp_path):
    packed = rle.encode(square())
    packed["counts"] = packed["counts"].decode()
    runs, value, length = [], 0, 0
    for pixel in square().flatten(order="F").tolist():
        if pixel != value:
            runs, value, length = [*runs, length], pixel, 0
        length += 1
    loose = {"size": [20, 30], "counts": [*runs, length]}
    write_set(tmp_path, [[[4, 2, 14, 2, 14, 12, 4, 12]], packed, loose])
    dataset = build_dataset("train", args_of(LSJ.format(tmp_path)))
    masks = [dataset.load(i)[1]["masks"] for i in range(3)]
    assert all(np.array_equal(mask[0].numpy(), square()) for mask in masks)


@pytest.mark.parametrize(
    ("segmentation", "found"),
    [
        (None, "neither polygons nor run lengths"),
        ([[1, 2, 3, 4]], "three corners"),
        ({"size": [9, 9], "counts": [81]}, r"size \[9, 9\]"),
    ],
)
def test_an_object_without_a_usable_mask_is_named(tmp_path, segmentation, found):
    write_set(tmp_path, [[[4, 2, 14, 2, 14, 12, 4, 12]], segmentation])
    with pytest.raises(UserError, match=f"annotation id 2 .*{found}.*--copy_paste"):
        build_dataset("train", args_of(LSJ.format(tmp_path)))


def test_without_pasting_nobody_needs_masks(tmp_path):
    write_set(tmp_path, [None])
    dataset = build_dataset("train", args_of(LSJ.format(tmp_path).replace("--copy_paste 100", "")))
    assert "masks" not in dataset[0][1]


def test_a_training_image_depends_on_seed_and_epoch_only_and_its_boxes_fit(tmp_path):
    flags = "--dataset_file synthetic --synthetic_size 40 60 --synthetic_objects 1 4 --augment lsj --lsj_size 64"
    dataset = build_dataset("train", args_of(flags + " --copy_paste 100 --synthetic_train 4"))
    first, again = dataset[1], dataset[1]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["boxes"], again[1]["boxes"])
    dataset.set_epoch(1)
    assert not torch.equal(first[0], dataset[1][0])
    plain = build_dataset("train", args_of(flags + " --synthetic_train 4"))
    assert any(len(dataset[i][1]["boxes"]) > len(plain[i][1]["boxes"]) for i in range(4))
    images, targets = collate([dataset[i] for i in range(4)])  # refuses boxes without area
    assert images.pixels.shape == (4, 3, 64, 64) and len(targets) == 4


def test_pasting_needs_squares():
    with pytest.raises(UserError, match="--augment lsj"):
        check_args(args_of("--copy_paste 3 --backbone_weights none"))
