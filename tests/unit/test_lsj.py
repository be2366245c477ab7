"""Large-scale jitter: boxes by hand at fixed factors and crops, the range of the draws, evaluation on squares."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from datasets import build_dataset, build_transforms, collate
from datasets.lsj import GREY, FitToSquare, LargeScaleJitter, PadToSquare, fitted_hw, lsj_steps
from datasets.transforms import resize
from models.postprocess import PostProcessor
from tests.unit.test_transforms import mask_of, picture, sample_of
from util.arg_rules import check_args
from util.args import get_args_parser
from util.errors import UserError

KINDS = ["pil", "tensor"]


def of_kind(kind: str, height: int = 20, width: int = 30):
    image = picture(height, width)
    return F.to_pil_image(image) if kind == "pil" else image


def pixels_of(image) -> np.ndarray:
    """Return (h, w, 3) of both kinds of images."""
    return np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()


def args_of(flags: str) -> Namespace:
    return get_args_parser().parse_args(flags.split())


def at_corner(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    """Let every position that is drawn be the first or the last that is possible."""
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.full(shape, (high - 1) * last))


# ---- operations by hand ----


@pytest.mark.parametrize(
    ("h", "w", "side", "expected"),
    [
        (20, 30, 60, (40, 60)),
        (480, 640, 1024, (768, 1024)),
        (640, 427, 1024, (1024, 683)),  # 427 * 1.6 = 683.2
        (427, 640, 102.4, (68, 102)),  # 68.32 and 102.4
        (3, 5, 2.5, (2, 3)),  # 1.5 and 2.5: halves go up
        (1, 500, 100, (1, 100)),  # not 0
    ],
)
def test_the_longer_side_becomes_that_of_the_square_and_both_are_rounded(h, w, side, expected):
    assert fitted_hw(h, w, side) == expected


def test_a_fixed_factor_scales_boxes_and_areas():
    jitter = LargeScaleJitter(30, (0.5, 0.5))  # 20 x 30 fits 30 x 30 as it is: half of it
    image, sample = jitter(picture(), sample_of([[2, 4, 10, 18]], areas=[100.0]))
    assert F.get_size(image) == [10, 15] and sample["boxes"].canvas_size == (10, 15)
    assert sample["boxes"].tolist() == [[1, 2, 5, 9]] and sample["area"].tolist() == [25]


@pytest.mark.parametrize(
    ("last", "boxes", "labels"),
    # Twice as large is 40 x 60. The first window is 0..30, 0..30; the last begins at x = 30, y = 10.
    [(False, [[4, 6, 20, 30]], [0]), (True, [[20, 10, 30, 28]], [1])],
)
def test_a_crop_moves_and_clips_boxes_and_drops_objects_outside(monkeypatch, last, boxes, labels):
    at_corner(monkeypatch, last)
    objects = sample_of([[2, 3, 10, 18], [25, 10, 30, 19]], areas=[1.0, 1.0])
    image, sample = LargeScaleJitter(30, (2.0, 2.0))(picture(), objects)
    assert F.get_size(image) == [30, 30]
    assert sample["boxes"].tolist() == boxes and sample["labels"].tolist() == labels
    (x0, y0, x1, y1), *_ = boxes
    assert sample["area"].tolist() == [(x1 - x0) * (y1 - y0)]
    large, _ = resize(picture(), sample_of([]), (40, 60))
    assert torch.equal(image, large[:, -30:, -30:] if last else large[:, :30, :30])


def test_only_the_side_that_is_too_long_is_cut():
    image, sample = LargeScaleJitter(30, (1.4, 1.4))(picture(), sample_of([[0, 0, 30, 20]]))  # 28 x 42
    assert F.get_size(image) == [28, 30] and sample["boxes"].tolist() == [[0, 0, 30, 28]]


def test_objects_that_become_thinner_than_a_hundredth_of_a_pixel_drop_out():
    boxes = [[5, 5, 5.09, 9], [5, 5, 9, 5.11], [1, 1, 8, 8]]  # a tenth of 0.09 and of 0.11
    _, sample = LargeScaleJitter(30, (0.1, 0.1))(picture(), sample_of(boxes))
    assert sample["labels"].tolist() == [1, 2] and len(sample["area"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_grey_on_the_right_and_at_the_bottom(kind):
    objects = sample_of([[2, 3, 10, 18]], masks=tv_tensors.Mask(mask_of([2, 3, 10, 18])[None]))
    image, sample = PadToSquare(32)(of_kind(kind), objects)
    pixels = pixels_of(image)
    assert pixels.shape == (32, 32, 3) and np.array_equal(pixels[:20, :30], pixels_of(picture()))
    assert (pixels[20:] == GREY).all() and (pixels[:, 30:] == GREY).all()
    assert sample["boxes"].tolist() == [[2, 3, 10, 18]] and sample["boxes"].canvas_size == (32, 32)
    assert torch.equal(sample["masks"].as_subclass(torch.Tensor), mask_of([2, 3, 10, 18], 32, 32)[None])
    assert sample["labels"].tolist() == [0] and sample["area"].tolist() == [10]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_the_size_of_the_square_stays_as_it_is(kind):
    image, _ = PadToSquare(24)(of_kind(kind, 24, 24), sample_of([], 24, 24))
    assert np.array_equal(pixels_of(image), pixels_of(picture(24, 24)))


def test_antialiasing_follows_the_flag():
    columns = torch.zeros(3, 18, 18, dtype=torch.uint8)
    columns[:, :, 1::3] = 255  # a third of it: the centres fall on the white columns
    for steps in (lsj_steps(train=t, size=6, scale=(1.0, 1.0), antialias=False) for t in (True, False)):
        assert (steps[0](columns, sample_of([], 18, 18))[0] == 255).all()
    smooth, _ = FitToSquare(6)(columns, sample_of([], 18, 18))
    assert smooth.max() < 200


# ---- random draws ----


def test_the_factors_fill_the_whole_range_and_never_leave_it():
    jitter = LargeScaleJitter(400, (0.1, 2.0))
    image = picture(5, 10)
    widths = [F.get_size(jitter(image, sample_of([], 5, 10))[0]) for _ in range(300)]
    heights, longer = np.array(widths).T  # a height of 400 x factor / 2 is never cut
    assert 20 <= heights.min() < 40 and 380 < heights.max() <= 400
    assert abs(heights.mean() - 210) < 20  # uniform: the mean of 20 and 400; the standard deviation of it is 6.3
    assert longer.max() == 400 and (longer == 400).mean() > 0.3  # factors above 1: 10 of 19


def test_crops_reach_all_borders_and_positions_between():
    jitter, corners = LargeScaleJitter(20, (1.5, 1.5)), set()  # 20 x 30 stays as it is, windows of 20 x 20
    for _ in range(200):
        _, sample = jitter(picture(), sample_of([[0, 0, 30, 20], [15, 0, 16, 20]]))
        corners.add(sample["boxes"][-1, 0].item() if len(sample["boxes"]) > 1 else None)
    assert corners == {15.0 - left for left in range(11)}


def test_every_training_image_is_a_square_with_boxes_inside():
    transform = build_transforms("train", args_of("--augment lsj --lsj_size 48"))
    for seed in range(40):
        torch.manual_seed(seed)
        image, sample = transform(picture(37, 64), sample_of([[0, 0, 64, 37], [3, 3, 30, 30]], 37, 64))
        boxes = sample["boxes"].as_subclass(torch.Tensor)
        assert image.shape[-2:] == (48, 48) and len(sample["labels"]) == len(boxes) == len(sample["area"])
        assert (boxes >= 0).all() and (boxes <= 48).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        collate([(image, sample)])  # does not raise


def test_half_of_the_images_are_mirrored_before_they_are_padded():
    steps = lsj_steps(train=True, size=60, scale=(0.5, 0.5))  # 20 x 30, padded on the right by 30
    left = []
    for _ in range(60):
        image, sample = picture(), sample_of([[2, 3, 10, 18]])
        for step in steps:
            image, sample = step(image, sample)
        left.append(sample["boxes"][0, 0].item())
    assert set(left) == {2.0, 20.0} and 15 < left.count(2.0) < 45  # in the image, not in the square


def test_the_same_seed_gives_the_same_image():
    transform = build_transforms("train", args_of("--augment lsj --lsj_size 40"))
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(transform(picture(), sample_of([[2, 3, 10, 18], [0, 0, 30, 20]])))
    (first, one), (second, two), (third, _) = runs
    assert torch.equal(first, second) and torch.equal(one["boxes"], two["boxes"])
    assert not torch.equal(first, third)


def test_an_image_without_objects_keeps_the_ranks():
    transform = build_transforms("train", args_of("--augment lsj --lsj_size 40"))
    for _ in range(6):
        _, (target,) = collate([transform(picture(), sample_of([]))])
        assert target.boxes.shape == (0, 4) and target.labels.shape == target.area.shape == (0,)


# ---- what the model and the evaluation see ----


def test_the_model_sees_the_grey_as_image_and_boxes_relative_to_the_square():
    args = args_of("--augment lsj --lsj_size 60")
    image, sample = build_transforms("val", args)(picture(), sample_of([[3, 6, 9, 15]]))
    batch, (target,) = collate([(image, sample)])
    assert batch.sizes == [(60, 60)] and target.size == (60, 60) and not batch.padding.any()
    assert torch.allclose(target.boxes, torch.tensor([[12 / 60, 21 / 60, 12 / 60, 18 / 60]]))
    assert (batch.pixels[0, :, 45, 10] == GREY).all(), "before it is normalised"


@pytest.mark.parametrize(("height", "width"), [(20, 30), (37, 23), (40, 40), (1, 90)])
def test_detections_on_the_square_come_back_as_pixels_of_the_file(height, width):
    box = [0.2 * width, 0.1 * height, 0.7 * width, 0.9 * height]
    args = args_of("--augment lsj --lsj_size 64")
    _, (target,) = collate([build_transforms("val", args)(picture(height, width), sample_of([box], height, width))])
    logits = torch.full((1, 1, 3), -9.0)
    (found,) = PostProcessor(topk=1, clip=True).select(logits, target.boxes[None], [target.orig_size], [7])
    assert torch.allclose(found.boxes_px, torch.tensor([box]), atol=1e-4)


def test_evaluation_images_are_neither_cut_nor_mirrored():
    args = args_of("--augment lsj --lsj_size 60")
    seen = [build_transforms("val", args)(picture(), sample_of([[2, 3, 10, 18]])) for _ in range(5)]
    assert all(torch.equal(image, seen[0][0]) for image, _ in seen)
    assert all(sample["boxes"].tolist() == [[4, 6, 20, 36]] for _, sample in seen)


def test_the_file_keeps_its_size_in_training():
    args = args_of("--augment lsj --lsj_size 64 --lsj_scale 1 1")
    _, sample = build_transforms("train", args)(picture(), sample_of([]))
    assert sample["orig_size"] == (20, 30)


@pytest.mark.parametrize("image_set", ["train", "val"])
def test_data_sets_give_squares(image_set):
    flags = "--dataset_file synthetic --synthetic_train 2 --synthetic_val 2 --augment lsj --lsj_size 96"
    dataset = build_dataset(image_set, args_of(flags))
    batch, targets = collate([dataset[0], dataset[1]])
    assert batch.pixels.shape == (2, 3, 96, 96) and not batch.padding.any()
    assert torch.equal(dataset[1][0], dataset[1][0]), "augmentation depends on seed, epoch and index only"
    assert [t.size for t in targets] == [(96, 96)] * 2


# ---- flags ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--augment lsj --lsj_size 0", "--lsj_size 0: must be at least 1"),
        ("--augment lsj --lsj_scale 0 2", "--lsj_scale [0.0, 2.0]: factors above 0"),
        ("--augment lsj --lsj_scale 2 0.5", "the smallest comes first"),
        ("--augment lsj --lsj_scale nan 2", "factors above 0"),
        ("--lsj_size 1280", "are for large-scale jitter: add --augment lsj"),
        ("--augment resize --lsj_scale 0.5 2", "add --augment lsj"),
    ],
)
def test_flags_that_cannot_work_say_the_way_out(flags, message):
    with pytest.raises(UserError) as error:
        check_args(args_of(flags))
    assert message in str(error.value)


def test_the_published_settings_are_accepted():
    for size in (1024, 1280, 1536):
        check_args(args_of(f"--augment lsj --lsj_size {size} --lsj_scale 0.1 2.0"))
