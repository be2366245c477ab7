"""The drawn shapes: deterministic, disjoint splits, tight boxes, and as hard as the flags say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datasets import build_dataset, build_eval_loader
from datasets.evaluators import CocoEvaluator
from datasets.synthetic import SHAPES, Scene, class_names, draw_scene
from util.args import get_args_parser
from util.errors import UserError
from util.structures import Detections


def parse(*flags: object):
    sizes = ["--synthetic_train", 12, "--synthetic_val", 6, "--augment", "flip", "--test_size", 0]
    return get_args_parser().parse_args([str(flag) for flag in ["--dataset_file", "synthetic", *sizes, *flags]])


def pictures(split: str, args) -> list[bytes]:
    dataset = build_dataset(split, args)
    return [dataset.load_image(i).tobytes() for i in range(len(dataset))]


def test_an_image_depends_on_split_and_index_only():
    assert pictures("train", parse()) == pictures(
        "train", parse("--seed", 5, "--synthetic_train", 12, "--augment", "none")
    )


def test_no_two_images_are_the_same_within_or_between_splits():
    args = parse("--synthetic_val", 12)
    assert len(set(pictures("train", args) + pictures("val", args))) == 24


def test_eval_in_training_set_shows_the_training_images():
    assert pictures("val", parse("--eval_in_training_set")) == pictures("train", parse())


def test_sizes_and_counts_follow_the_flags():
    args = parse("--synthetic_size", 40, 64, "--synthetic_val", 3, "--synthetic_classes", 4)
    dataset = build_dataset("val", args)
    assert len(dataset) == 3 and dataset.num_classes == 4
    assert dataset[0][0].shape == (3, 40, 64) and dataset.load(0)[1]["orig_size"] == (40, 64)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_boxes_are_tight_around_the_visible_pixels_of_their_object(overlap):
    scene = Scene(objects=(4, 8), object_size=(0.1, 0.7), overlap=overlap)
    for index in range(8):
        drawing = draw_scene(scene, "train", index)
        assert len(drawing.boxes) == len(drawing.labels) >= 1
        for number, box in enumerate(drawing.boxes):
            rows, columns = np.nonzero(drawing.owner == number)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_object_and_not_only_its_box_is_drawn():
    drawing = draw_scene(Scene(objects=(1, 1), texture=0.0), "train", 0)
    outside, inside = drawing.pixels[drawing.owner < 0], drawing.pixels[drawing.owner == 0]
    assert (outside == outside[0]).all()  # no texture: one colour
    assert np.abs(inside.astype(int).mean(0) - outside[0]).max() > 60


def test_texture_raises_the_variation_of_the_background():
    def spread(texture):
        drawing = draw_scene(Scene(texture=texture), "train", 3)
        return drawing.pixels[drawing.owner < 0].std(0).mean()

    assert spread(0.0) < 1e-3 < spread(0.2) < spread(1.0)


def test_the_number_of_objects_stays_in_its_range_and_uses_it():
    counts = [len(draw_scene(Scene(objects=(0, 3), object_size=(0.1, 0.2)), "train", i).labels) for i in range(40)]
    assert set(counts) == {0, 1, 2, 3}


def test_an_image_without_objects_keeps_its_ranks():
    dataset = build_dataset("train", parse("--synthetic_objects", 0, 0))
    sample = dataset[0][1]
    assert sample["boxes"].shape == (0, 4) and sample["labels"].shape == sample["area"].shape == (0,)


def test_object_sides_stay_in_their_range():
    scene = Scene(objects=(1, 1), object_size=(0.25, 0.5))
    sides = [(box[2:] - box[:2]).max() for i in range(30) for box in draw_scene(scene, "train", i).boxes]
    assert min(sides) >= 31 and max(sides) <= 65 and max(sides) - min(sides) > 15  # 32..64 of 128 pixels, rounded


def test_without_allowed_overlap_boxes_are_apart():
    for index in range(10):
        boxes = torch.from_numpy(draw_scene(Scene(objects=(6, 6), overlap=0.0), "train", index).boxes)
        low, high = torch.max(boxes[:, None, :2], boxes[:, :2]), torch.min(boxes[:, None, 2:], boxes[:, 2:])
        both = (high - low).clamp(min=0).prod(-1)
        assert both.fill_diagonal_(0).sum() == 0


def test_every_shape_covers_a_good_part_of_its_box_and_none_all_of_it_but_the_square():
    found = {}
    scene = Scene(classes=12, objects=(1, 1), object_size=(0.4, 0.5))
    for index in range(120):
        drawing = draw_scene(scene, "train", index)
        box = drawing.boxes[0]
        found[drawing.labels[0]] = (drawing.owner == 0).sum() / np.prod(box[2:] - box[:2])
    assert set(found) == set(range(12))
    for label, share in found.items():
        assert 0.25 < share < 0.97, f"{list(SHAPES)[label]} fills {share:.2f} of its box"


def test_above_twelve_classes_colour_and_shape_name_the_class():
    assert class_names(3) == ["circle", "square", "triangle"]
    names = class_names(48)
    assert len(set(names)) == 48 and names[0] == "red circle" and names[13] == "green square"
    scene = Scene(classes=48, objects=(1, 1), texture=0.0)
    reds = [d for d in (draw_scene(scene, "train", i) for i in range(80)) if names[d.labels[0]].startswith("red")]
    assert reds
    for drawing in reds:
        red, green, blue = drawing.pixels[drawing.owner == 0].mean(0)
        assert red > 1.3 * green and red > 1.3 * blue


def test_masks_are_there_when_asked_for():
    dataset = build_dataset("train", parse())
    assert "masks" not in dataset.load(0)[1]
    dataset.with_masks = True
    sample = dataset.load(0)[1]
    assert sample["masks"].shape == (len(sample["boxes"]), 128, 128)
    assert sample["masks"].sum((1, 2)).tolist() == sample["area"].tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--synthetic_classes", 49], r"--synthetic_classes 49: 1 to 48"),
        (["--synthetic_objects", 3, 1], r"--synthetic_objects \(3, 1\): fewest, then most"),
        (["--synthetic_object_size", 0.5, 1.5], r"--synthetic_object_size .*in \(0, 1\]"),
        (["--synthetic_size", 8, 128], r"--synthetic_size \(8, 128\): at least 16"),
        (["--synthetic_overlap", 2], r"--synthetic_overlap 2.0: 0 to 1"),
        (["--synthetic_texture", -1], r"--synthetic_texture -1.0: 0 to 1"),
        (["--synthetic_train", 0], r"the train set has no images"),
        (["--num_classes", 3], r"--num_classes 3: these annotations need 6"),
    ],
)
def test_impossible_flags_say_what_is_allowed(flags, message):
    with pytest.raises(UserError, match=message):
        build_dataset("train", parse(*flags))


def test_the_ground_truth_as_detections_scores_one():
    dataset = build_dataset("val", parse("--synthetic_classes", 3))
    evaluator = CocoEvaluator(dataset)
    for batch, targets in build_eval_loader(dataset, batch_size=2, num_workers=0):
        found = []
        for target, (h, w) in zip(targets, batch.sizes):
            cx, cy, bw, bh = (target.boxes * torch.tensor([w, h, w, h])).unbind(1)
            corners = torch.stack([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2], 1)
            found.append(Detections(torch.ones(len(target)), target.labels, corners))
        evaluator.update(found, targets)
    numbers = evaluator.summarize()
    assert numbers["AP"] == pytest.approx(1.0) and numbers["images"] == 6
