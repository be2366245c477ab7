"""Large-scale jitter (Simple Copy-Paste, arXiv 2012.07177, section 3) on squares of one size, as Co-DETR uses it.

Training images are scaled by a factor of a wide range, cut to the square, mirrored and padded with grey; evaluation
images fill the square as far as their shape allows. Grey counts as image: the model gets no padding mask, and boxes are
relative to the square. So a model that was trained like this is also evaluated like this.

Where a sample has masks, boxes shrink to what a crop leaves of them; `datasets.copy_paste` then pastes objects of
another image. Images are PIL images or uint8 tensors (3, h, w), samples as in `transforms`.
"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from datasets.copy_paste import boxes_from_masks
from datasets.transforms import crop, keep_objects, resize

GREY = 114  # of 0..255: the value of the padding
THINNEST = 0.01  # pixels; objects that are not wider and higher than this drop out

Pixels = Image.Image | Tensor


def fitted_hw(height: int, width: int, side: float) -> tuple[int, int]:
    """Return the (h, w) at which an image just fits into a square of `side`, in pixels; at least one each."""
    ratio = side / max(height, width)
    return max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)


def pad_to_square(image: Pixels, sample: dict, size: int) -> tuple[Pixels, dict]:
    """Add grey on the right and at the bottom, so that height and width become `size` pixels. Boxes stay."""
    height, width = F.get_size(image)
    # A mask has no grey: what is added is no object.
    fill = {tv_tensors.Mask: 0, "others": GREY}
    return v2.Pad([0, 0, size - width, size - height], fill=fill)(image, sample)


class LargeScaleJitter(nn.Module):
    """Scale an image by a uniform factor and cut out at most a square, at a uniform position.

    `v2.ScaleJitter` is not used: it leaves `area` as it is and gives strips no pixel at small factors.

    Args:
        size: side of the square, pixels. Factor 1: the image just fits into it.
        scale: smallest and largest factor.
        antialias: as in `resize`.
    """

    def __init__(self, size: int, scale: tuple[float, float], *, antialias: bool = True) -> None:
        super().__init__()
        self.size, self.scale, self.antialias = size, scale, antialias

    def forward(self, image: Pixels, sample: dict) -> tuple[Pixels, dict]:
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        height, width = fitted_hw(*F.get_size(image), self.size * factor)
        image, sample = resize(image, sample, (height, width), antialias=self.antialias)
        if max(height, width) > self.size:
            h, w = min(height, self.size), min(width, self.size)
            top, left = (int(torch.randint(rest + 1, ())) for rest in (height - h, width - w))
            image, sample = crop(image, sample, top, left, h, w)
            if "masks" in sample:
                sample = boxes_from_masks(sample)
        corners = sample["boxes"].as_subclass(Tensor)
        return image, keep_objects(sample, (corners[:, 2:] - corners[:, :2] > THINNEST).all(dim=1))


class PadToSquare(nn.Module):
    """Pad to a square with a side of `size` pixels; no image may be larger."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Pixels, sample: dict) -> tuple[Pixels, dict]:
        return pad_to_square(image, sample, self.size)


class FitToSquare(nn.Module):
    """Resize an image so that it just fits into a square with a side of `size` pixels, and pad it.

    `orig_size` becomes what the whole square covers in pixels of the file, since predictions are relative to it.
    """

    def __init__(self, size: int, *, antialias: bool = True) -> None:
        super().__init__()
        self.size, self.antialias = size, antialias

    def forward(self, image: Pixels, sample: dict) -> tuple[Pixels, dict]:
        hw = fitted_hw(*F.get_size(image), self.size)
        image, sample = resize(image, sample, hw, antialias=self.antialias)
        covered = tuple(old * self.size / new for old, new in zip(sample["orig_size"], hw))
        return pad_to_square(image, sample | {"orig_size": covered}, self.size)


def lsj_steps(*, train: bool, size: int, scale: tuple[float, float], antialias: bool = True) -> list[nn.Module]:
    """Return the steps of training or evaluation; arguments as in `LargeScaleJitter`, images stay 0..255."""
    if not train:
        return [FitToSquare(size, antialias=antialias)]
    return [LargeScaleJitter(size, scale, antialias=antialias), v2.RandomHorizontalFlip(0.5), PadToSquare(size)]
