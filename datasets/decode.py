"""Image files to pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # PIL's modes of greyscale images with 16 bits per pixel


def decode_rgb(content: bytes) -> Tensor:
    """Return the image of an encoded file as uint8 RGB (3, h, w), not turned by its EXIF tag.

    Ordinary JPEG goes through torchvision: the same pixels as PIL's in less time, for both use libjpeg-turbo. PIL reads
    everything else. So it does PNG: where a file is damaged, torchvision 0.29 kills the process instead of raising.

    Raises:
        Exception: whatever PIL raises over a file that it cannot read.
    """
    image = Image.open(io.BytesIO(content))  # reads the header only
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # PIL reads a few damaged files that torchvision does not, and says better what is wrong with others
    return rgb_tensor(image)


def rgb_tensor(image: Image.Image) -> Tensor:
    """Return any PIL image as uint8 RGB (3, h, w); transparency is dropped, not blended.

    Of greyscale with 16 bits the upper eight count, as PIL reads colours with 16 bits; its own conversion would make
    everything above 255 white.
    """
    if image.mode in DEEP_GREY or (image.mode, image.format) == ("I", "PNG"):  # the latter: older versions of PIL
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return pil_to_tensor(image.convert("RGB"))


def turned_by_exif(path: Path) -> bool:
    """Say whether viewers show an image file turned or mirrored, which nothing here does."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(Base.Orientation, 1) not in (0, 1)
    except Exception:  # whatever PIL raises; a tag that cannot be read turns nothing
        return False
