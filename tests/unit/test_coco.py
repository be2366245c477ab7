"""COCO-format data: what is read, what is mended, and what every kind of bad input is answered with."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset, build_train_loader, check_same_categories
from datasets.annotations import mend_coco, pack
from datasets.coco import COCO_IDS, CocoDetection
from datasets.transforms import eval_transforms
from tests.unit.small_coco import HEIGHT, WIDTH, annotation, content, read, write
from util.args import get_args_parser
from util.errors import UserError


def parse(*flags: object):
    return get_args_parser().parse_args([str(flag) for flag in flags])


def custom_flags(folder, part: str = "train") -> list[object]:
    return [f"--{part}_images", folder, f"--{part}_json", folder / "instances.json"]


# ---- what is read ----


def test_boxes_become_corners_and_labels_follow_the_order_of_category_ids(tmp_path):
    dataset = read(tmp_path, content([annotation(1, 2, [3, 4, 10, 12], category_id=9)]))
    assert dataset.class_names == ["kind 5", "kind 9"] and dataset.category_ids == [5, 9] and dataset.num_classes == 2
    _, sample = dataset.load(dataset.image_ids.index(2))
    assert sample["boxes"].tolist() == [[3, 4, 13, 16]]
    assert sample["labels"].tolist() == [1]
    assert sample["area"].tolist() == [50]
    assert sample["orig_size"] == (HEIGHT, WIDTH) and sample["image_id"] == 2


def test_categories_listed_out_of_order_still_get_labels_by_id(tmp_path):
    data = content([annotation(1, 1, [0, 0, 5, 5], category_id=9)])
    data["categories"].reverse()
    dataset = read(tmp_path, data)
    assert dataset.category_ids == [5, 9]
    assert dataset.load(0)[1]["labels"].tolist() == [1]


def test_raw_category_ids_are_the_labels_and_unused_ones_have_no_category(tmp_path):
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 5, 5])], categories=(2, 5)), category_ids="raw")
    assert dataset.class_names == ["N/A", "N/A", "kind 2", "N/A", "N/A", "kind 5"]
    assert dataset.category_ids == [-1, -1, 2, -1, -1, 5]
    assert dataset.load(0)[1]["labels"].tolist() == [5]


def test_auto_takes_raw_ids_for_the_80_categories_of_coco_only(tmp_path):
    assert len(COCO_IDS) == 80
    assert read(tmp_path, content([], categories=tuple(COCO_IDS))).num_classes == 91
    assert read(tmp_path, content([], categories=tuple(COCO_IDS)), category_ids="contiguous").num_classes == 80
    assert read(tmp_path, content([], categories=tuple(COCO_IDS - {90}))).num_classes == 79


def test_num_classes_may_be_larger_than_needed_but_not_smaller(tmp_path):
    dataset = read(tmp_path, content([]), num_classes=4)
    assert dataset.class_names == ["kind 5", "kind 9", "N/A", "N/A"] and dataset.category_ids == [5, 9, -1, -1]
    with pytest.raises(UserError, match=r"--num_classes 1: these annotations need 2"):
        read(tmp_path, content([]), num_classes=1)


def test_images_come_in_the_order_of_ids_and_those_without_objects_stay(tmp_path):
    data = content([annotation(1, 3, [0, 0, 5, 5])], images=3)
    data["images"].reverse()
    dataset = read(tmp_path, data)
    assert dataset.image_ids == [1, 2, 3]
    _, sample = dataset[0]
    assert sample["boxes"].shape == (0, 4) and sample["labels"].shape == (0,) and sample["area"].shape == (0,)


def test_crowd_regions_are_no_targets_but_the_evaluation_knows_them(tmp_path):
    crowd = annotation(2, 1, [1, 1, 9, 9], iscrowd=1)
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 5, 5]), crowd]))
    assert dataset.load(0)[1]["boxes"].tolist() == [[0, 0, 5, 5]]
    assert sorted(dataset.coco.anns) == [1, 2]


def test_file_names_may_have_subfolders(tmp_path):
    data = content([], images=1)
    data["images"][0]["file_name"] = "site a/day 1/1.png"
    assert read(tmp_path, data).load_image(0).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("P", "png"), ("1", "png")]
)
def test_every_kind_of_image_is_opened_as_rgb(tmp_path, mode, suffix):
    data = content([], images=1)
    data["images"][0]["file_name"] = f"x.{suffix}"
    Image.new(mode, (WIDTH, HEIGHT)).save(tmp_path / f"x.{suffix}")
    dataset = read(tmp_path, data)
    assert dataset.load_image(0).mode == "RGB"
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)


def test_the_exif_tag_does_not_turn_an_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.jpg", exif=exif)
    data = content([], images=1)
    data["images"][0]["file_name"] = "1.jpg"
    assert read(tmp_path, data).load_image(0).size == (WIDTH, HEIGHT)


def test_cached_images_are_read_from_memory_once_the_files_are_gone(tmp_path):
    dataset = read(tmp_path, content([]))
    before = dataset.load_image(0)
    dataset.cache([0])
    (tmp_path / "1.png").unlink()
    assert np.array_equal(np.asarray(dataset.load_image(0)), np.asarray(before))


def test_a_pickled_data_set_carries_no_annotation_objects(tmp_path):
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 5, 5])]))
    assert dataset.coco.anns
    copy = pickle.loads(pickle.dumps(dataset))
    assert "coco" not in vars(copy)
    assert torch.equal(copy[0][0], dataset[0][0])


# ---- the flags ----


def test_the_standard_layout_is_found_under_coco_path(tmp_path):
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / f"{part}2017").mkdir()
        data = content([], images=3 if part == "train" else 2)
        (tmp_path / f"{part}2017" / "instances.json").touch()
        write(tmp_path / f"{part}2017", data).rename(tmp_path / "annotations" / f"instances_{part}2017.json")
    args = parse("--coco_path", tmp_path)
    assert [len(build_dataset(part, args)) for part in ("train", "val")] == [3, 2]


def test_eval_in_training_set_shows_the_training_images_with_the_transforms_of_evaluation(tmp_path):
    write(tmp_path, content([]))
    dataset = build_dataset("val", parse(*custom_flags(tmp_path), "--eval_in_training_set", "--test_size", 60))
    assert dataset[0][0].shape == (3, 60, 80)


def test_a_missing_coco_path_names_the_flags(tmp_path):
    with pytest.raises(
        UserError, match=r"--coco_path .*nowhere is not a folder.*--val_images FOLDER and --val_json FILE"
    ):
        build_dataset("val", parse("--coco_path", tmp_path / "nowhere"))


def test_a_set_without_images_is_refused(tmp_path):
    write(tmp_path, content([], images=0))
    with pytest.raises(UserError, match="the train set has no images"):
        build_dataset("train", parse(*custom_flags(tmp_path)))


def test_different_categories_in_training_and_validation_are_an_error(tmp_path):
    for name, categories in (("a", (5, 9)), ("b", (5, 10))):
        (tmp_path / name).mkdir()
        write(tmp_path / name, content([], categories=categories))
    args = parse(*custom_flags(tmp_path / "a"), *custom_flags(tmp_path / "b", "val"))
    train, val = build_dataset("train", args), build_dataset("val", args)
    check_same_categories(train, train)
    with pytest.raises(
        UserError, match=r"label 1 is .*\(9, 'kind 9'\) in training and \(10, 'kind 10'\) in validation"
    ):
        check_same_categories(train, val)


def test_a_missing_category_in_validation_is_an_error(tmp_path):
    train, val = read(tmp_path, content([])), read(tmp_path, content([], categories=(5,)))
    with pytest.raises(UserError, match=r"label 1 is .* in training and nothing in validation"):
        check_same_categories(train, val)


# ---- bad files ----


def test_a_missing_image_folder_is_said_at_once_with_the_flag(tmp_path):
    path = write(tmp_path, content([]))
    with pytest.raises(
        UserError, match=r"1\.png \(image id 1 of .*is .*wrong the right folder\? It is given by --train_images"
    ):
        CocoDetection(tmp_path / "wrong", path, transforms=eval_transforms(test_size=0, max_size=1))


def test_a_missing_image_names_its_file_and_id(tmp_path):
    dataset = read(tmp_path, content([]))
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png \(image id 2 of .*instances\.json\) does not exist"):
        dataset[1]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image_names_its_file_and_id(tmp_path, suffix):
    data = content([], images=1)
    data["images"][0]["file_name"] = f"1.{suffix}"
    dataset = read(tmp_path, data)
    file = tmp_path / f"1.{suffix}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"1\.{suffix} \(image id 1\) cannot be read"):
        dataset[0]


def test_a_file_that_is_no_image_names_its_file_and_id(tmp_path):
    dataset = read(tmp_path, content([]))
    (tmp_path / "1.png").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"1\.png \(image id 1\) cannot be read"):
        dataset[0]


def test_an_error_in_a_worker_still_names_the_image(tmp_path):
    dataset = read(tmp_path, content([]))
    (tmp_path / "2.png").unlink()
    loader = build_train_loader(dataset, batch_size=2, num_workers=1, seed=0)
    with pytest.raises(UserError, match=r"^image file .*image id 2.*does not exist; restore it") as error:
        next(iter(loader))
    assert "Traceback" not in str(error.value)


def test_an_image_of_another_size_than_annotated_is_an_error(tmp_path):
    dataset = read(tmp_path, content([]))
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"image id 1\) is 30 x 40, the annotation file says 40 x 30"):
        dataset[0]


def test_a_missing_annotation_file_names_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"instances\.json does not exist; give the right one by --train_json"):
        CocoDetection(tmp_path, tmp_path / "instances.json", transforms=eval_transforms(test_size=0, max_size=1))


def test_a_file_that_is_not_json_is_said_to_be_so(tmp_path):
    with pytest.raises(UserError, match=r"instances\.json is not valid JSON: .*line 1 column 2"):
        read(tmp_path, "{images: []}")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_missing_list_is_named(tmp_path, key):
    data = content([])
    del data[key]
    with pytest.raises(UserError, match=rf"has no list `{key}`: this is not the COCO format"):
        read(tmp_path, data)


def test_a_results_file_in_place_of_annotations_is_recognised(tmp_path):
    with pytest.raises(UserError, match="has no list `images`"):
        read(tmp_path, "[]")


def test_a_file_without_categories_is_refused(tmp_path):
    with pytest.raises(UserError, match="`categories` is empty"):
        read(tmp_path, content([], categories=()))


def test_repeated_image_ids_are_an_error(tmp_path):
    data = content([])
    data["images"][1]["id"] = 1
    with pytest.raises(UserError, match="image id 1 occurs more than once"):
        read(tmp_path, data)


def test_an_image_without_a_file_name_is_an_error(tmp_path):
    data = content([])
    write(tmp_path, data)
    del data["images"][0]["file_name"]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"needs an `id` .* and a `file_name`"):
        CocoDetection(tmp_path, tmp_path / "bad.json", transforms=eval_transforms(test_size=0, max_size=1))


# ---- bad annotations ----


@pytest.mark.parametrize(
    "bbox", [[1, 2, 3], [1, 2, 3, float("nan")], [1, 2, float("inf"), 4], "1 2 3 4", [1, 2, "3", 4], [1, None, 3, 4]]
)
def test_a_malformed_box_names_its_annotation(tmp_path, bbox):
    with pytest.raises(UserError, match=r"annotation id 7 has the bbox .*four finite numbers"):
        read(tmp_path, content([annotation(7, 1, bbox)]))


def test_a_missing_box_names_its_annotation(tmp_path):
    with pytest.raises(UserError, match=r"annotation id 7 has the bbox None"):
        read(tmp_path, content([annotation(7, 1, None)]))


def test_an_unknown_category_names_its_annotation_and_the_known_ids(tmp_path):
    with pytest.raises(UserError, match=r"annotation id 7 has category id 6; the file knows 5, 9\."):
        read(tmp_path, content([annotation(7, 1, [0, 0, 5, 5], category_id=6)]))


def test_a_box_outside_the_image_is_clipped_and_said_once(tmp_path, capsys):
    boxes = [annotation(1, 1, [-6, 10, 20, 30]), annotation(2, 1, [35, 0, 10, 5]), annotation(3, 1, [0, 0, 40.5, 30])]
    dataset = read(tmp_path, content(boxes))
    assert dataset.load(0)[1]["boxes"].tolist() == [[0, 10, 14, 30], [35, 0, 40, 5], [0, 0, 40, 30]]
    dataset.coco  # noqa: B018 (reads the file again, and says nothing)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].endswith("annotations whose box reaches outside the image, clipped: 2 (the first has id 1)")


@pytest.mark.parametrize("bbox", [[5, 5, 0, 5], [5, 5, 5, 0], [5, 5, -3, 5], [40, 5, 5, 5], [-9, 5, 9, 5]])
def test_a_box_without_area_is_dropped_and_said_once(tmp_path, capsys, bbox):
    dataset = read(tmp_path, content([annotation(1, 1, bbox), annotation(2, 1, [1, 1, 2, 2], category_id=9)]))
    _, sample = dataset.load(0)
    assert sample["boxes"].tolist() == [[1, 1, 3, 3]] and sample["labels"].tolist() == [1]
    assert "no area inside the image, no training targets: 1 (the first has id 1)" in capsys.readouterr().out


def test_the_evaluation_keeps_boxes_as_they_are_in_the_file(tmp_path):
    dataset = read(tmp_path, content([annotation(1, 1, [-6, 10, 20, 30])]))
    assert dataset.coco.anns[1]["bbox"] == [-6, 10, 20, 30]


@pytest.mark.parametrize("ids", [(0, 1), (4, 4), (None, 3), ("a", "b")])
def test_annotation_ids_that_are_zero_or_repeated_or_missing_are_renumbered_and_said_once(tmp_path, capsys, ids):
    dataset = read(tmp_path, content([annotation(i, 1, [1, 1, 5, 5]) for i in ids]))
    assert sorted(dataset.coco.anns) == [1, 2]
    assert capsys.readouterr().out.count("renumbered") == 1


def test_a_missing_area_is_that_of_the_mask_or_else_of_the_box(tmp_path, capsys):
    triangle = {"segmentation": [[0, 0, 20, 0, 0, 20]]}
    entries = [annotation(1, 1, [0, 0, 20, 20], area=None, **triangle), annotation(2, 1, [0, 0, 6, 5], area=None)]
    dataset = read(tmp_path, content(entries))
    of_mask, of_box = dataset.load(0)[1]["area"].tolist()
    assert of_mask == pytest.approx(200, rel=0.08) and of_box == 30
    assert dataset.coco.anns[2]["area"] == 30
    assert "without area, computed from the mask or box: 2" in capsys.readouterr().out


def test_a_missing_iscrowd_is_no_crowd(tmp_path, capsys):
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 6, 5], iscrowd=None)]))
    assert len(dataset.load(0)[1]["boxes"]) == 1 and dataset.coco.anns[1]["iscrowd"] == 0
    assert "without iscrowd, taken as 0: 1" in capsys.readouterr().out


def test_annotations_of_images_that_are_not_listed_are_dropped_and_said_once(tmp_path, capsys):
    dataset = read(tmp_path, content([annotation(1, 77, [0, 0, 6, 5]), annotation(2, 1, [0, 0, 6, 5])]))
    assert sorted(dataset.coco.anns) == [2]
    assert "of images that are not listed, dropped: 1 (the first has id 1)" in capsys.readouterr().out


def test_an_annotation_file_without_image_sizes_loads_and_clips_by_the_file(tmp_path):
    data = content([annotation(1, 1, [30, 20, 50, 50])])
    write(tmp_path, data)
    for image in data["images"]:
        del image["width"], image["height"]
    assert read(tmp_path, data).load(0)[1]["boxes"].tolist() == [[30, 20, WIDTH, HEIGHT]]


def test_annotations_are_packed_in_the_order_of_the_images(tmp_path):
    data = content([annotation(1, 2, [0, 0, 1, 1]), annotation(2, 1, [0, 0, 2, 2]), annotation(3, 2, [0, 0, 3, 3])])
    mend_coco(data, tmp_path)
    packed, _ = pack(data, [1, 2], {5: 0, 9: 1}, tmp_path)
    assert packed.first.tolist() == [0, 1, 3]
    assert packed.boxes[:, 2].tolist() == [2, 1, 3]


# ---- real data ----


@pytest.mark.parametrize(("name", "images", "classes"), [("coco128", 96, 91), ("bccd", 291, 3)])
def test_one_epoch_of_real_images_loads_with_the_training_transform(shared_data, capsys, name, images, classes):
    folder = shared_data / name
    flags = ["--train_images", folder / "images", "--train_json", folder / "annotations/instances_train.json"]
    # Small sizes keep the test short; the operations are the same.
    sizes = ["--train_scales", 96, 112, "--crop_scales", 80, 100, "--crop_range", 60, 90, "--max_size", 160]
    dataset = build_dataset("train", parse(*flags, *sizes))
    assert (len(dataset), dataset.num_classes) == (images, classes)
    loader = build_train_loader(dataset, batch_size=4, num_workers=0, seed=0)
    seen, objects = set(), 0
    for batch, targets in loader:
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape[1] == 3
        for target in targets:
            seen.add(target.image_id)
            objects += len(target)
            assert (target.boxes >= 0).all() and (target.boxes <= 1 + 1e-6).all()  # rounding of cxcywh
            assert (target.labels < classes).all()
    assert len(seen) == images // 4 * 4 and objects > images
    assert not capsys.readouterr().out  # nothing to mend in these files
