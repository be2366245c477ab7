"""The augmentation of DETR and Deformable DETR on torchvision v2 and tv_tensors.

A sample is a pair `(image, sample)`: a uint8 RGB tensor (3, h, w) and a dict with

    boxes     (M, 4) `tv_tensors.BoundingBoxes`, xyxy in pixels of the image
    labels    (M,) int64, class index of the model
    area      (M,) float32, pixels; the annotated area (of the mask where there is one), not that of the box
    iscrowd   (M,) int64
    image_id  int;  orig_size  (h, w) of the file

and, where a task needs them, further tv_tensors (`masks`), which follow the geometry, and per-object tensors. Every
random number comes from torch's default generator, which the data set seeds per image.

The functions of torchvision that do the work take PIL images too, and so does everything here. Tensors are several
times faster, and their pixels are within one grey level of PIL's (`python util/benchmark.py loader` compares both; with
torch 2.6 within one per resize).
"""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

PER_OBJECT = ("boxes", "labels", "area", "iscrowd", "masks", "keypoints", "track_ids")  # rows are objects

Image = Tensor | PIL.Image.Image
Sample = tuple[Image, dict]


def resized_hw(height: int, width: int, size: int, max_size: int | None = None) -> tuple[int, int]:
    """Return the (h, w) that the family's resize rule gives, in pixels.

    The shorter side becomes `size`, or less where the longer one would pass `max_size`. The smaller size is rounded, so
    the longer side may end a few pixels above `max_size` (200 x 1000 with 1333: 267 x 1335), as in the published runs.
    """
    shorter, longer = min(height, width), max(height, width)
    if max_size is not None and longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if shorter == size:
        return height, width
    size = max(size, 1)  # a strip image of extreme aspect ratio keeps one pixel
    other = int(size * longer / shorter)
    return (size, other) if height <= width else (other, size)


def hflip(image: Image, sample: dict) -> Sample:
    """Mirror left and right."""
    return _on_geometry(F.horizontal_flip, image, sample)


def resize(image: Image, sample: dict, hw: tuple[int, int], *, antialias: bool = True) -> Sample:
    """Resize to exactly `hw`, bilinearly; `area` scales by the product of both ratios.

    With `antialias` this is PIL's filter, which averages over what a pixel covers when it shrinks; without it every
    pixel is interpolated from four neighbours only, whatever the ratio (mmdet's preprocessing, used by Co-DETR).
    torchvision ignores `antialias` for PIL images, whose filter always has it.
    """
    old_h, old_w = F.get_size(image)
    if (old_h, old_w) == tuple(hw):
        return image, sample
    if isinstance(image, Tensor):  # the three colours of a pixel side by side, as decoded: 2.5 times faster
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    options = {"size": list(hw), "interpolation": InterpolationMode.BILINEAR, "antialias": antialias}
    image, sample = _on_geometry(F.resize, image, sample, **options)
    sample["area"] = sample["area"] * (hw[1] / old_w) * (hw[0] / old_h)
    return image, sample


def crop(image: Image, sample: dict, top: int, left: int, height: int, width: int) -> Sample:
    """Cut a window, in pixels: boxes are clipped, objects without area drop out, `area` is that of the clipped box."""
    image, sample = _on_geometry(F.crop, image, sample, top=top, left=left, height=height, width=width)
    sample = keep_objects(sample, has_area(sample["boxes"]))
    x0, y0, x1, y1 = sample["boxes"].as_subclass(Tensor).unbind(-1)
    sample["area"] = (x1 - x0) * (y1 - y0)
    return image, sample


def has_area(boxes: Tensor) -> Tensor:
    """Return (M,) bool, True where the xyxy box has a positive width and height."""
    boxes = boxes.as_subclass(Tensor)
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


def keep_objects(sample: dict, keep: Tensor) -> dict:
    """Return the sample with only the objects where `keep` (M,) is True."""
    return {
        key: tv_tensors.wrap(value[keep], like=value) if key in PER_OBJECT else value for key, value in sample.items()
    }


def _on_geometry(operation, image: Image, sample: dict, **options) -> Sample:
    """Apply a torchvision functional to the image and to every tv_tensor of the sample."""
    moved = {
        key: operation(value, **options) if isinstance(value, tv_tensors.TVTensor) else value
        for key, value in sample.items()
    }
    return operation(image, **options), moved


class RandomResize(nn.Module):
    """Resize by the family's rule to a shorter side drawn from `sizes`; one entry makes it deterministic."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None, *, antialias: bool = True) -> None:
        super().__init__()
        self.sizes, self.max_size, self.antialias = list(sizes), max_size, antialias

    def forward(self, image: Image, sample: dict) -> Sample:
        size = self.sizes[_randint(0, len(self.sizes) - 1)] if len(self.sizes) > 1 else self.sizes[0]
        hw = resized_hw(*F.get_size(image), size, self.max_size)
        return resize(image, sample, hw, antialias=self.antialias)


class RandomSizeCrop(nn.Module):
    """Crop a window whose height and width are uniform in [smallest, min(side, largest)], at a uniform position.

    An image side below `smallest` is kept whole: the interval of the published code would be empty there.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def _side(self, side: int) -> int:
        highest = min(side, self.largest)
        return _randint(min(self.smallest, highest), highest)

    def forward(self, image: Image, sample: dict) -> Sample:
        old_h, old_w = F.get_size(image)
        width, height = self._side(old_w), self._side(old_h)
        top, left = _randint(0, old_h - height), _randint(0, old_w - width)
        return crop(image, sample, top, left, height, width)


class DropEmpty(nn.Module):
    """The last step: objects without area drop out.

    A crop may leave a sliver one rounding step wide, which a later resize rounds to nothing.
    """

    def forward(self, image: Image, sample: dict) -> Sample:
        return image, keep_objects(sample, has_area(sample["boxes"]))


def train_transforms(
    *,
    augment: str,
    scales: Sequence[int],
    crop_scales: Sequence[int],
    crop_range: tuple[int, int],
    max_size: int,
    test_size: int,
    antialias: bool = True,
) -> nn.Module:
    """Return the training transform.

    Args:
        augment: `detr` = flip, then with equal chance (a) resize or (b) resize, crop, resize (DETR, appendix A.4);
            `resize` = flip and (a); `flip` and `none` show every image at its evaluation size.
        scales: shorter sides of (a), pixels.
        crop_scales: shorter sides before the crop of (b), pixels.
        crop_range: smallest and largest side of the crop, pixels.
        max_size: largest longer side, pixels; not before the crop.
        test_size: shorter side in evaluation, pixels; 0 for no resizing.
        antialias: average over what a pixel covers when shrinking (see `resize`).

    Raises:
        ValueError: an unknown `augment`.
    """
    flip = v2.RandomHorizontalFlip(0.5)
    rescale = RandomResize(scales, max_size, antialias=antialias)
    if augment == "detr":
        zoom = [RandomResize(crop_scales, antialias=antialias), RandomSizeCrop(*crop_range), rescale]
        steps = [flip, v2.RandomChoice([rescale, v2.Compose(zoom)])]
    elif augment == "resize":
        steps = [flip, rescale]
    elif augment in ("flip", "none"):
        fixed = RandomResize([test_size], max_size, antialias=antialias)
        steps = [flip] * (augment == "flip") + [fixed] * (test_size > 0)
    else:
        raise ValueError(f"augment {augment!r}: use detr, resize, flip or none")
    return v2.Compose([*steps, DropEmpty()])


def eval_transforms(*, test_size: int, max_size: int, antialias: bool = True) -> nn.Module:
    """Return the evaluation transform: shorter side `test_size` (0: as in the file), longer at most `max_size`.

    `antialias` as in `resize`.
    """
    rescale = RandomResize([test_size], max_size, antialias=antialias)
    return v2.Compose([rescale] * (test_size > 0) + [DropEmpty()])


def _randint(low: int, high: int) -> int:
    """Return an int from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))
