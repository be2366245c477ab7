"""Maps of encoder levels on the image, padding left out, and what lies on the image itself.

The detector takes the valid cells of a level, those that are not padding, for the whole image (`valid_ratios`), and so
do these functions: what lies in the padding never counts, and the canvas does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from util.boxes import cxcywh_to_xyxy
from util.pixels import denormalize
from util.structures import ImageBatch, Memory


def valid_sizes(memory: Memory) -> list[list[tuple[int, int]]]:
    """Return (h, w), the number of cells that are not padding, of each level of each image: `[image][level]`."""
    padding = memory.padding.split([h * w for h, w in memory.shapes], dim=1)
    sides = []
    for level, shape in zip(padding, memory.shapes):
        inside = ~level.unflatten(1, shape)
        sides.append(torch.stack([inside[:, :, 0].sum(1), inside[:, 0].sum(1)], -1))
    return [[(h, w) for h, w in image] for image in torch.stack(sides, 1).tolist()]


def on_image(level: Tensor, valid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize a map of a level to the unpadded image, (..., h, w) -> (..., H, W), bilinearly.

    Args:
        level: any numbers per cell of the padded level.
        valid: its first rows and columns that are not padding, see `valid_sizes`; they become the image, the rest is
            cut off first, so that nothing of it bleeds into the image.
        size: (H, W) of the image in pixels of the network's input, `ImageBatch.sizes`.
    """
    own = level[..., : valid[0], : valid[1]]
    resized = interpolate(own.reshape(-1, 1, *own.shape[-2:]).float(), size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*level.shape[:-2], *size)


def mean_of_levels(levels: Sequence[Tensor], valid: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """Return the mean over levels of non-negative maps, each divided by its maximum in the image: (H, W) in [0, 1].

    This is D of Co-DETR (eq. 7) if the maps are the channel norms of the levels. A level that is 0 all over stays 0.

    Args:
        levels: [(h, w)] of one image, padding included.
        valid, size: as in `on_image`, one `valid` for each level.
    """
    total = torch.zeros(size, device=levels[0].device)
    for level, (h, w) in zip(levels, valid):
        own = level[:h, :w].float()
        peak = own.amax()
        total += on_image(own / torch.where(peak == 0, 1.0, peak), (h, w), size)
    return (total / len(levels)).clamp(max=1)  # interpolation may round 1 up


def foreground(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the union of boxes as (H, W) bool: the pixels whose centre lies inside a box.

    Args:
        boxes: (M, 4) cxcywh relative to the image; M may be 0.
        size: (H, W) of the image in pixels.
    """
    height, width = size
    left, top, right, bottom = (side[:, None] for side in cxcywh_to_xyxy(boxes).unbind(-1))
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    y = (torch.arange(height, device=boxes.device) + 0.5) / height
    columns, rows = (left <= x) & (x < right), (top <= y) & (y < bottom)  # (M, W), (M, H)
    return (rows[:, :, None] & columns[:, None]).any(0)


def picture(images: ImageBatch, index: int) -> Tensor:
    """Return an unpadded image of the batch with its colours back, (H, W, 3) in [0, 1], on the CPU."""
    height, width = images.sizes[index]
    pixels = images.pixels[index, :, :height, :width].cpu()
    colours = denormalize(pixels) if pixels.is_floating_point() else pixels / 255
    return colours.permute(1, 2, 0)
