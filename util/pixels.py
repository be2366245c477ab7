"""Colours as the network sees them: scaled to 0..1, minus ImageNet's mean, over its standard deviation.

Images stay uint8 up to the device: a quarter of the bytes to copy, and no float arithmetic in the loader.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(pixels: Tensor) -> Tensor:
    """Return uint8 RGB images (..., 3, h, w) as float32, scaled and normalised."""
    colours = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    # Plain numbers: mean and deviation as tensors would be copied to the device in every step.
    for channel, mean, std in zip(colours.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return colours


def denormalize(pixels: Tensor) -> Tensor:
    """Return normalised images (..., 3, h, w) with their colours back, float32 in [0, 1]."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() * std + mean).clamp(0, 1)
