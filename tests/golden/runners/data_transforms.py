"""Runs the golden case `data_transforms`: every step from the annotation file to the padded batch."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from datasets.coco import CocoDetection
from datasets.collate import make_target, pad_images
from datasets.transforms import crop, eval_transforms, hflip, resize, resized_hw
from util.pixels import normalize


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Assert the whole case within the tolerances of `meta`."""
    for w, h, size, max_size, new_w, new_h in meta["resize_table"]["rows"]:
        assert resized_hw(h, w, size, max_size) == (new_h, new_w), f"{w} x {h} to {size}, at most {max_size}"
    height, width = arrays["input/size"].tolist()
    numbers = {key: _integers(text) for key, text in meta["operations"].items() if isinstance(text, str)}
    sizes = {key: resized_hw(height, width, *numbers[key]) for key in ("resize", "resize_capped")}
    tolerance = meta["tolerances"]["boxes"]
    _same(hflip(*_input(arrays)), arrays, "hflip", tolerance, grey_levels=0)
    window = dict(zip(("top", "left", "height", "width"), numbers["crop"], strict=True))
    _same(crop(*_input(arrays), **window), arrays, "crop", tolerance, grey_levels=0)
    for name, hw in sizes.items():
        _same(resize(*_input(arrays), hw), arrays, name, tolerance, grey_levels=1)
    _check_normalize(meta, arrays)
    batch = pad_images([torch.ones(3, h, w) for h, w in zip(numbers["batch"][::2], numbers["batch"][1::2])])
    assert np.array_equal(batch.padding.numpy(), arrays["batch/mask"])
    assert float(batch.pixels.sum()) == float(arrays["batch/sum"])
    _check_conversion(meta, arrays)


def _integers(text: str) -> list[int]:
    """Return the numbers in the description of an operation: "top 4, left 12" gives [4, 12]."""
    return [int(number) for number in re.findall(r"\d+", text)]


def _input(arrays: dict[str, np.ndarray]) -> tuple[Tensor, dict]:
    """Return a fresh copy of the stored picture and its sample."""
    size = tuple(arrays["input/size"].tolist())
    sample = {key: torch.from_numpy(arrays[f"input/{key}"].copy()) for key in ("labels", "area", "iscrowd")}
    boxes = torch.from_numpy(arrays["input/boxes"].copy())
    sample["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    image = torch.from_numpy(arrays["input/image"].copy()).permute(2, 0, 1)
    return image, {**sample, "image_id": 42, "orig_size": size}


def _same(ours, arrays: dict[str, np.ndarray], name: str, tolerance: float, grey_levels: int) -> None:
    image, sample = ours
    pixels, expected = image.permute(1, 2, 0).numpy().astype(int), arrays[f"{name}/image"].astype(int)
    assert pixels.shape == expected.shape, f"{name}: {pixels.shape}, stored {expected.shape}"
    assert np.abs(pixels - expected).max() <= grey_levels, f"{name}: image"
    assert image.shape[1:] == tuple(arrays[f"{name}/size"].tolist())
    _same_objects(sample, arrays, name, tolerance)


def _same_objects(sample: dict, arrays: dict[str, np.ndarray], name: str, tolerance: float) -> None:
    assert sample["orig_size"] == tuple(arrays[f"{name}/orig_size"].tolist())
    for key in ("boxes", "labels", "area", "iscrowd"):
        value, expected = sample[key].numpy(), arrays[f"{name}/{key}"]
        # Areas are products of two lengths, so their tolerance is relative.
        assert np.allclose(value, expected, rtol=tolerance if key == "area" else 0, atol=tolerance), f"{name}: {key}"


def _check_normalize(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    image, sample = _input(arrays)
    pixels = normalize(image)
    assert np.abs(pixels.numpy() - arrays["normalize/image"]).max() <= meta["tolerances"]["normalize"]
    target = make_target(sample, tuple(pixels.shape[-2:]))
    assert np.abs(target.boxes.numpy() - arrays["normalize/boxes"]).max() <= meta["tolerances"]["normalize"]
    assert target.size == tuple(arrays["normalize/size"].tolist())


def _check_conversion(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write picture and annotations to disk and read them as a data set whose labels are the raw category ids."""
    (image_id,) = arrays["convert/image_id"].tolist()
    annotations = [
        {"id": i, "image_id": image_id, **a}
        for i, a in enumerate(meta["operations"]["convert"]["annotations"], start=1)
    ]
    height, width = arrays["convert/orig_size"].tolist()
    content = {
        "images": [{"id": image_id, "file_name": "picture.png", "height": height, "width": width}],
        "categories": [{"id": i, "name": str(i)} for i in sorted({a["category_id"] for a in annotations})],
        "annotations": annotations,
    }
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(arrays["input/image"]).save(Path(folder) / "picture.png")
        (Path(folder) / "instances.json").write_text(json.dumps(content))
        transforms = eval_transforms(test_size=0, max_size=1333)
        dataset = CocoDetection(folder, Path(folder) / "instances.json", transforms=transforms, category_ids="raw")
        image, sample = dataset.load(0)
    assert image.shape[1:] == tuple(arrays["convert/size"].tolist())
    assert sample["image_id"] == image_id
    _same_objects(sample, arrays, "convert", meta["tolerances"]["boxes"])
