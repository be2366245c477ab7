"""Projection of backbone maps to the width of the transformer, and the extra levels (Deformable-DETR, appendix A.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _projection(channels: int, width: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, width, kernel_size=kernel, stride=stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, width))


class InputProjection(nn.ModuleList):
    """1x1 convolutions for the backbone maps, 3x3 stride-2 ones for extra levels, each with a GroupNorm.

    The first extra level reads the last *backbone* map (not the projected one), every further one the level before it.
    A list of modules, so that the parameters are named `input_proj.{level}.{0,1}` as published.
    """

    def __init__(self, channels: Sequence[int], num_levels: int, width: int) -> None:
        extra = num_levels - len(channels)
        layers = [_projection(c, width, kernel=1, stride=1) for c in channels]
        layers += [_projection(channels[-1] if i == 0 else width, width, kernel=3, stride=2) for i in range(extra)]
        super().__init__(layers)
        self.num_backbone_maps = len(channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Project `features`, [(B, C_l, h, w)], to `len(self)` maps [(B, D, h, w)]."""
        maps = [project(feature) for project, feature in zip(self, features)]
        source = features[-1]
        for project in list(self)[self.num_backbone_maps :]:
            source = project(source)
            maps.append(source)
        return maps
