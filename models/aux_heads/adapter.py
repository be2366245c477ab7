"""The pyramid of a single encoder map (Co-DETR, section 3.2: multi-scale adapter)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

FINEST, COARSEST = 8, 64  # strides; one more level is added for every encoder


class SingleScaleAdapter(nn.Module):
    """Maps of strides 8 to 64 from one map: bilinear doubling and a convolution upwards, stride-2 ones downwards.

    Args:
        width: channels of the map.
        stride: of the map, in pixels: 16 or 32.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        finer, coarser = (stride // FINEST).bit_length() - 1, (COARSEST // stride).bit_length() - 1
        self.finer = nn.ModuleList(block(width, stride=1) for _ in range(finer))
        self.coarser = nn.ModuleList(block(width, stride=2) for _ in range(coarser))

    def forward(self, features: Tensor) -> list[Tensor]:
        """Return the maps, finest first; a doubled map may reach one cell beyond the image."""
        maps = [features]
        for layer in self.finer:
            maps.insert(0, layer(F.interpolate(maps[0], scale_factor=2, mode="bilinear", align_corners=False)))
        for layer in self.coarser:
            maps.append(layer(maps[-1]))
        return maps


def block(width: int, *, stride: int) -> nn.Sequential:
    """Return a 3x3 convolution and a GroupNorm(32); with stride 2 it makes the next coarser level."""
    return nn.Sequential(nn.Conv2d(width, width, 3, stride=stride, padding=1), nn.GroupNorm(32, width))
