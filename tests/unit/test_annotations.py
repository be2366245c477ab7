"""Annotation files that other tools wrote: what their oddities become, and which of them are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datasets.annotations import mend_coco, read_coco
from util.errors import UserError

PATH = Path("instances.json")
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]  # a polygon of 100 square pixels in a box of 12 x 12


def mended(image: dict | None = None, **changes: object) -> dict:
    """Return the only annotation of a file after mending; a change to None takes the entry out."""
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 12, 12], "area": 144, "iscrowd": 0, **changes}
    data = {
        "images": [{"id": 1, "file_name": "1.png", "height": 30, "width": 40, **(image or {})}],
        "categories": [{"id": 1, "name": "kind"}],
        "annotations": [entry],
    }
    mend_coco(data, PATH)
    return data["annotations"][0]


@pytest.mark.parametrize("area", [None, "144", float("nan")])
def test_an_area_that_is_no_number_is_computed(area):
    assert mended(area=area)["area"] == 144
    assert mended(area=area, segmentation=SQUARE)["area"] == pytest.approx(100, abs=10)


@pytest.mark.parametrize("segmentation", [[], [[]], [[1, 2, 3, 4]], [1, 2, 3, 4, 5, 6], {}, "polygon"])
def test_a_segmentation_that_is_no_mask_leaves_the_area_to_the_box(segmentation):
    assert mended(area=None, segmentation=segmentation)["area"] == 144


def test_iscrowd_may_be_empty_but_not_a_text():
    assert mended(iscrowd=None)["iscrowd"] == 0
    with pytest.raises(UserError, match="annotation id 1 has iscrowd '0'; it must be the number 0 or 1"):
        mended(iscrowd="0")


def test_a_category_that_is_no_number_is_unknown():
    with pytest.raises(UserError, match=r"annotation id 1 has category id \[1\]; the file knows 1"):
        mended(category_id=[1])


@pytest.mark.parametrize("size", [{"width": "40"}, {"height": -1}])
def test_an_image_size_that_is_no_number_of_pixels_is_refused(size):
    with pytest.raises(UserError, match=r"image id 1 has width and height .*; write numbers of pixels"):
        mended(image=size)


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_an_entry_that_is_no_object_is_refused(tmp_path, key):
    data = {"images": [], "annotations": [], "categories": [], key: [{}, "entry"]}
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"`{key}` has the entry 'entry'; write an object"):
        read_coco(tmp_path / "a.json", "--train_json")


@pytest.mark.parametrize("mask", [{"counts": "abc"}, [["a"] * 6], [[1, 2]], {"counts": [1, 2]}, 7])
def test_a_missing_area_is_that_of_the_box_where_the_mask_cannot_be_read(mask) -> None:
    assert mended(area=None, segmentation=mask)["area"] == 144
