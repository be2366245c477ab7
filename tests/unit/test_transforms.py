"""The augmentation: sizes, boxes and areas by hand; ranges of the random draws; collation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import to_pil_image

from datasets import collate
from datasets.collate import pad_images
from datasets.transforms import (
    DropEmpty,
    RandomResize,
    RandomSizeCrop,
    crop,
    eval_transforms,
    hflip,
    resize,
    resized_hw,
    train_transforms,
)
from util.errors import UserError

RECIPE = {
    "scales": range(480, 801, 32),
    "crop_scales": [400, 500, 600],
    "crop_range": (384, 600),
    "max_size": 1333,
    "test_size": 800,
}


def picture(height: int = 20, width: int = 30) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows * 3 % 256, columns * 3 % 256, rows * 0 + 99]).to(torch.uint8)


def sample_of(boxes: list, height: int = 20, width: int = 30, areas: list | None = None, **more) -> dict:
    count = len(boxes)
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {
        "boxes": tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(count),
        "area": torch.tensor(areas or [10.0] * count),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "image_id": 7,
        "orig_size": (height, width),
        **more,
    }


def mask_of(box: list[int], height: int = 20, width: int = 30) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


# ---- the resize rule ----


@pytest.mark.parametrize(
    ("h", "w", "size", "max_size", "expected"),
    [
        (480, 640, 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, truncated
        (640, 480, 800, 1333, (1066, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (313, 1024, 800, 1333, (407, 1331)),  # capped: round(1333 * 313 / 1024) = 407
        (200, 1000, 800, 1333, (267, 1335)),  # the rounding passes the cap, as published
        (600, 600, 400, None, (400, 400)),
        (480, 640, 480, 1333, (480, 640)),  # nothing to do
    ],
)
def test_the_shorter_side_becomes_the_size_and_the_longer_is_truncated(h, w, size, max_size, expected):
    assert resized_hw(h, w, size, max_size) == expected


def test_a_strip_image_keeps_at_least_one_pixel():
    assert min(resized_hw(1, 5000, 800, 1333)) == 1


# ---- operations by hand ----


def test_hflip_mirrors_boxes_and_pixels():
    image, sample = hflip(picture(), sample_of([[2, 3, 10, 18]]))
    assert sample["boxes"].tolist() == [[20, 3, 28, 18]]
    assert torch.equal(image, picture().flip(-1))


def test_resize_scales_boxes_by_the_actual_ratios_and_area_by_their_product():
    image, sample = resize(picture(), sample_of([[2, 3, 10, 18]], areas=[100.0]), (40, 90))
    assert image.shape == (3, 40, 90) and sample["boxes"].canvas_size == (40, 90)
    assert sample["boxes"].tolist() == [[6, 6, 30, 36]]
    assert sample["area"].tolist() == [600]


def test_resize_is_pils_antialiased_bilinear_filter():
    image, _ = resize(picture(200, 300), sample_of([], 200, 300), (40, 60))
    expected = to_pil_image(picture(200, 300)).resize((60, 40), Image.Resampling.BILINEAR)
    difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert image.dtype == torch.uint8 and np.abs(difference).max() <= 1


def checkerboard(size: int = 8) -> torch.Tensor:
    black_and_white = np.indices((size, size)).sum(axis=0) % 2 * 255
    return torch.from_numpy(black_and_white.astype(np.uint8)).repeat(3, 1, 1)


def test_without_antialiasing_a_shrunk_pixel_sees_its_nearest_four_only():
    # A third of 9: the centres fall on pixels 1, 4 and 7, so a coarser checkerboard is left; averaging makes it grey.
    plain, sample = resize(checkerboard(9), sample_of([[3, 3, 9, 6]], 9, 9), (3, 3), antialias=False)
    smooth, other = resize(checkerboard(9), sample_of([[3, 3, 9, 6]], 9, 9), (3, 3))
    assert plain[0].tolist() == [[0, 255, 0], [255, 0, 255], [0, 255, 0]]
    assert smooth.min() > 80 and smooth.max() < 175
    assert sample["boxes"].tolist() == other["boxes"].tolist() == [[1, 1, 3, 2]]


def test_antialiasing_changes_nothing_where_an_image_grows():
    plain, smooth = (resize(checkerboard(), sample_of([], 8, 8), (20, 20), antialias=a)[0] for a in (False, True))
    assert plain.shape == smooth.shape == (3, 20, 20)
    assert (plain.int() - smooth.int()).abs().max() <= 1  # rounding


def test_every_resize_of_training_and_evaluation_follows_the_flag():
    recipe = {"scales": [3], "crop_scales": [3], "crop_range": (3, 3), "max_size": 1333, "test_size": 3}
    for antialias in (False, True):
        transforms = [train_transforms(augment=a, **recipe, antialias=antialias) for a in ("detr", "resize", "none")]
        transforms += [eval_transforms(test_size=3, max_size=1333, antialias=antialias)]
        for transform in transforms:
            for seed in range(4):  # both branches of `detr`
                torch.manual_seed(seed)
                pixels = transform(checkerboard(9), sample_of([], 9, 9))[0][0]
                extreme = pixels.min() == 0 and pixels.max() == 255
                assert extreme == (not antialias), (transform, seed)


def test_crop_clips_boxes_drops_those_outside_and_takes_the_area_of_the_box():
    boxes = [[2, 3, 10, 18], [0, 0, 5, 20], [28, 0, 30, 20]]
    image, sample = crop(picture(), sample_of(boxes), top=4, left=5, height=10, width=20)
    assert torch.equal(image, picture()[:, 4:14, 5:25])
    assert sample["boxes"].tolist() == [[0, 0, 5, 10]]
    assert sample["labels"].tolist() == [0] and sample["area"].tolist() == [50] and len(sample["iscrowd"]) == 1
    assert sample["orig_size"] == (20, 30)  # that of the file, whatever is cut


def test_masks_follow_the_image():
    box = [4, 2, 12, 10]
    sample = sample_of([box, [20, 10, 30, 20]])
    sample["masks"] = tv_tensors.Mask(torch.stack([mask_of(box), mask_of([20, 10, 30, 20])]))
    _, sample = resize(*crop(*hflip(picture(), sample), top=0, left=12, height=16, width=16), (32, 32))
    assert sample["boxes"].tolist() == [[12, 4, 28, 20]]  # flipped to 18..26, minus 12, times 2
    assert torch.equal(sample["masks"].as_subclass(torch.Tensor), mask_of([12, 4, 28, 20], 32, 32)[None])


def test_a_sliver_that_resizing_rounded_to_nothing_drops_out():
    sliver = [torch.nextafter(torch.tensor(25.0), torch.tensor(0.0)).item(), 0, 25, 20]
    samples = [resize(picture(), sample_of([sliver, [1, 1, 5, 5]]), (20, w)) for w in range(31, 60)]
    assert any(sample["boxes"][0, 0] == sample["boxes"][0, 2] for _, sample in samples)
    for image, sample in samples:
        collate([DropEmpty()(image, sample)])  # does not raise


# ---- random draws ----


def test_random_resize_draws_every_size_and_no_other():
    transform = RandomResize([10, 20, 40])
    drawn = {transform(picture(), sample_of([]))[0].shape[1] for _ in range(60)}
    assert drawn == {10, 20, 40}


def test_crop_sides_cover_the_whole_interval_with_both_ends():
    sizes = [RandomSizeCrop(17, 25)(picture(), sample_of([]))[0].shape for _ in range(300)]
    assert {w for _, _, w in sizes} == set(range(17, 26))  # 25 < 30, the width
    assert {h for _, h, _ in sizes} == {17, 18, 19, 20}  # 20 is the height


def test_crop_positions_reach_all_borders():
    box = [[0, 0, 30, 20]]
    images = [RandomSizeCrop(18, 18)(picture(), sample_of(box))[0] for _ in range(200)]
    assert picture()[:, 0, 0].tolist() in [image[:, 0, 0].tolist() for image in images]
    assert picture()[:, -1, -1].tolist() in [image[:, -1, -1].tolist() for image in images]


def test_an_image_smaller_than_the_smallest_crop_is_kept_whole():
    image, sample = RandomSizeCrop(384, 600)(picture(), sample_of([[2, 3, 10, 18]]))
    assert image.shape == (3, 20, 30) and sample["boxes"].tolist() == [[2, 3, 10, 18]]


def test_the_detr_recipe_gives_published_sizes_only():
    transform = train_transforms(augment="detr", **RECIPE)
    zoomed = 0
    for _ in range(20):
        image, _ = transform(picture(60, 80), sample_of([[0, 0, 80, 60]], 60, 80))
        h, w = image.shape[-2:]
        assert min(h, w) in RECIPE["scales"] and max(h, w) <= 1335
        zoomed += (h, w) != resized_hw(60, 80, min(h, w), 1333)
    assert 2 <= zoomed <= 18  # some were cropped, some not


def test_the_detr_recipe_keeps_the_ranks_of_an_empty_sample():
    transform = train_transforms(augment="detr", **RECIPE)
    for _ in range(6):
        _, sample = transform(picture(60, 80), sample_of([], 60, 80))
        assert sample["boxes"].shape == (0, 4)
        assert sample["labels"].shape == sample["area"].shape == sample["iscrowd"].shape == (0,)


@pytest.mark.parametrize("augment", ["flip", "none"])
def test_without_scale_augmentation_training_sees_the_evaluation_size(augment):
    recipe = {**RECIPE, "test_size": 40}
    shape = train_transforms(augment=augment, **recipe)(picture(), sample_of([]))[0].shape
    assert shape == eval_transforms(test_size=40, max_size=1333)(picture(), sample_of([]))[0].shape == (3, 40, 60)


@pytest.mark.parametrize(("augment", "boxes"), [("flip", {2.0, 20.0}), ("none", {2.0})])
def test_only_flip_flips(augment, boxes):
    transform = train_transforms(augment=augment, **{**RECIPE, "test_size": 0})
    seen = {transform(picture(), sample_of([[2, 3, 10, 18]]))[1]["boxes"][0, 0].item() for _ in range(30)}
    assert seen == boxes


def test_resize_augmentation_does_not_crop():
    transform = train_transforms(augment="resize", **{**RECIPE, "scales": [40, 60]})
    sizes = {tuple(transform(picture(), sample_of([]))[0].shape[-2:]) for _ in range(30)}
    assert sizes == {(40, 60), (60, 90)}


def test_an_unknown_augmentation_names_the_known_ones():
    with pytest.raises(ValueError, match="use detr, resize, flip or none"):
        train_transforms(augment="mosaic", **RECIPE)


def test_test_size_0_leaves_the_image_as_it_is():
    assert eval_transforms(test_size=0, max_size=10)(picture(), sample_of([]))[0].shape == (3, 20, 30)


# ---- collate ----


def test_collate_pads_to_the_largest_sides_and_normalises_by_the_unpadded_size():
    samples = [
        (torch.ones(3, 20, 30), sample_of([[3, 5, 9, 15]])),
        (torch.ones(3, 10, 40), sample_of([[0, 0, 40, 10]], 10, 40)),
    ]
    batch, targets = collate(samples)
    assert batch.pixels.shape == (2, 3, 20, 40) and batch.sizes == [(20, 30), (10, 40)]
    assert not batch.padding[0, :20, :30].any() and batch.padding[0, :, 30:].all()
    assert not batch.padding[1, :10].any() and batch.padding[1, 10:].all()
    assert torch.equal(batch.pixels[:, 0] == 0, batch.padding)
    assert torch.allclose(targets[0].boxes, torch.tensor([[0.2, 0.5, 0.2, 0.5]]))
    assert torch.allclose(targets[1].boxes, torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    assert type(targets[0].boxes) is torch.Tensor and targets[0].image_id == 7
    assert targets[1].size == (10, 40) and targets[0].labels.tolist() == [0] and targets[0].area.tolist() == [10]


def test_collate_keeps_the_ranks_of_an_image_without_objects():
    _, (target,) = collate([(torch.ones(3, 20, 30), sample_of([]))])
    assert target.boxes.shape == (0, 4) and target.labels.shape == (0,) and len(target) == 0


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [5, 9, 8, 7], [0, 0, float("nan"), 4], [0, 0, float("inf"), 4]])
def test_a_bad_box_is_an_error_that_names_the_image(box):
    with pytest.raises(UserError, match=r"image id 7: box .* must be finite with a positive"):
        collate([(torch.ones(3, 20, 30), sample_of([[1, 1, 2, 2], box]))])


def test_a_crowd_region_among_the_targets_is_an_error():
    sample = sample_of([[1, 1, 2, 2]])
    sample["iscrowd"][0] = 1
    with pytest.raises(UserError, match="image id 7: a crowd region is among the targets"):
        collate([(torch.ones(3, 20, 30), sample)])


def test_masks_reach_the_target_at_the_augmented_size():
    sample = sample_of([[1, 1, 5, 5]], masks=tv_tensors.Mask(mask_of([1, 1, 5, 5])[None]))
    _, (target,) = collate([(torch.ones(3, 20, 30), sample)])
    assert type(target.masks) is torch.Tensor and target.masks.sum() == 16


def test_one_image_needs_no_padding():
    assert not pad_images([torch.ones(3, 4, 6)]).padding.any()
