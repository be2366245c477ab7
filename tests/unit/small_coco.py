"""A hand-made COCO-format data set in a temporary folder."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from datasets.coco import CocoDetection
from datasets.transforms import eval_transforms

WIDTH, HEIGHT = 40, 30


def annotation(number: int, image_id: int, bbox: list, category_id: int = 5, **more) -> dict:
    """Return one annotation with all fields; `more` replaces or adds some, None removes one."""
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0, "area": 50.0}
    return {key: value for key, value in {**entry, **more}.items() if value is not None}


def content(annotations: list[dict], images: int = 2, categories: tuple[int, ...] = (5, 9)) -> dict:
    """Return a COCO-format dict whose images have the ids 1, 2, ... and the files 1.png, 2.png, ..."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"kind {i}"} for i in categories],
        "annotations": annotations,
    }


def write(folder: Path, data: dict | str) -> Path:
    """Write the images that `data` lists, where they are not there yet, and the annotation file; return its path."""
    path = folder / "instances.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    for image in data.get("images", []) if isinstance(data, dict) else []:
        file = folder / image["file_name"]
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (WIDTH, HEIGHT), (image["id"] * 40 % 256, 90, 120)).save(file)
    return path


def read(folder: Path, data: dict | str, **options) -> CocoDetection:
    """Return the data set of `data`, without resizing."""
    path = write(folder, data)
    transforms = eval_transforms(test_size=0, max_size=1333)
    return CocoDetection(folder, path, **{"transforms": transforms, **options})
