"""Instance masks of COCO-format files: run lengths in memory, decoded when an image is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from util.errors import UserError


@dataclass
class PackedMasks:
    """The masks of all objects as COCO's compressed run lengths in one array, which worker processes share."""

    first: np.ndarray  # (objects + 1,) int64; the code of object i is data[first[i]:first[i + 1]]
    data: np.ndarray  # (bytes,) uint8

    def decode(self, rows: range, height: int, width: int) -> Tensor:
        """Return the masks of these objects, (M, height, width) uint8, 1 where the object is."""
        if not rows:
            return torch.zeros(0, height, width, dtype=torch.uint8)
        codes = [
            {"size": [height, width], "counts": self.data[self.first[i] : self.first[i + 1]].tobytes()} for i in rows
        ]
        return torch.from_numpy(np.ascontiguousarray(rle.decode(codes).transpose(2, 0, 1)))


def pack_masks(
    annotations: Sequence[dict], sizes: dict[int, tuple[int | None, int | None]], path: Path, reason: str
) -> PackedMasks:
    """Pack the `segmentation` of these annotations: polygons, or run lengths in either form.

    Args:
        annotations: objects in the order of the packed boxes.
        sizes: (width, height) of the images by id.
        path: of the annotation file, for messages.
        reason: the flag that needs masks and the way out, for messages.

    Raises:
        UserError: an object has no mask, its mask cannot be read, or its image no size; names the annotation id.
    """
    codes = []
    for annotation in annotations:
        where = f"annotation id {annotation['id']} of {path}"
        width, height = sizes[annotation["image_id"]]
        if not (width and height):
            raise UserError(f"image id {annotation['image_id']} of {path} has no width and height: {reason}")
        try:
            codes.append(_encoded(annotation.get("segmentation"), height, width))
        except Exception as error:  # pycocotools raises what it likes over odd polygons
            raise UserError(f"{where} has no usable segmentation ({error}): {reason}") from error
    first = np.concatenate([[0], np.cumsum([len(code) for code in codes], dtype=np.int64)]).astype(np.int64)
    return PackedMasks(first, np.frombuffer(b"".join(codes), np.uint8))


def _encoded(segmentation: object, height: int, width: int) -> bytes:
    """Return COCO's compressed run lengths of a segmentation."""
    if isinstance(segmentation, list):
        polygons = [part for part in segmentation if isinstance(part, list) and len(part) >= 6]  # three corners
        if not polygons:
            raise ValueError("no polygon with three corners")
        return rle.merge(rle.frPyObjects(polygons, height, width))["counts"]
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise ValueError("neither polygons nor run lengths")
    if list(segmentation.get("size", [])) != [height, width]:
        raise ValueError(f"run lengths of size {segmentation.get('size')}, the image has {[height, width]}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return rle.frPyObjects(segmentation, height, width)["counts"]
    return counts.encode() if isinstance(counts, str) else counts
