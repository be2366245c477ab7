"""Image files to pixels."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor


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
    return pil_to_tensor(image.convert("RGB"))
