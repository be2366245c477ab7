"""Backbones: image to feature maps. `BACKBONES` is the registry; a new backbone is one line there.

A backbone is a module with `strides` and `channels` (one number per map) whose `forward(pixels)` returns the maps, and
whose parameters live under `body`, as in the published checkpoints.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.resnet import RESNETS, FrozenBatchNorm2d, ResNetBackbone
from models.backbones.swin import SWINS, SwinBackbone
from ops.gather import is_portable
from util.errors import UserError

__all__ = [
    "BACKBONES",
    "FrozenBatchNorm2d",
    "Joiner",
    "ResNetBackbone",
    "SwinBackbone",
    "build_backbone",
    "resize_padding",
]


class Joiner(nn.Sequential):
    """Backbone and position encoding side by side: names begin with `0.` and `1.`, as in the published checkpoints.

    The forward pass runs the backbone only. The encoding, `joiner[1](padding, dtype)`, is applied by the caller to
    every feature level, because further levels are made after the backbone.
    """

    def __init__(self, backbone: nn.Module, position_encoding: nn.Module) -> None:
        super().__init__(backbone, position_encoding)
        self.strides: tuple[int, ...] = backbone.strides
        self.channels: tuple[int, ...] = backbone.channels

    def forward(self, pixels: Tensor, padding: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return a map (B, channels[i], h, w) and its padding (B, h, w) for every stage that the backbone returns.

        `pixels` (B, 3, H, W) are normalised images, `padding` (B, H, W) bool is True on padding.
        """
        return [(feature, resize_padding(padding, feature.shape[-2:])) for feature in self[0](pixels)]


def resize_padding(padding: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `padding` (B, H, W) bool as (B, h, w) bool for a map of `size` (h, w), by nearest neighbour."""
    if is_portable():  # runtimes round differently in ONNX's Resize
        rows, columns = (_nearest(old, new, padding.device) for old, new in zip(padding.shape[-2:], size))
        return padding[:, rows][:, :, columns]
    return F.interpolate(padding[:, None].float(), size=tuple(size))[:, 0].bool()


def _nearest(old: int, new: int, device: torch.device) -> Tensor:
    """Return which of `old` cells each of `new` cells takes, (new,) int64."""
    return torch.div(torch.arange(new, device=device) * old, new, rounding_mode="floor")


def build_backbone(args: Namespace) -> nn.Module:
    """Build the backbone that `--backbone` names; raises UserError for an unknown name or settings it cannot have."""
    if args.backbone not in BACKBONES:
        raise UserError(f"--backbone {args.backbone} is unknown: choose one of {', '.join(BACKBONES)}")
    if args.backbone_norm not in ("frozen", "train"):
        raise UserError(f"--backbone_norm must be frozen or train, got {args.backbone_norm!r}")
    return BACKBONES[args.backbone](args)


def backbone_stages(args: Namespace) -> tuple[int, ...]:
    """Return the stages whose maps are used, counted from 0 (stride 4): `--return_interm_indices` or the last ones."""
    return tuple(args.return_interm_indices or ((1, 2, 3) if args.num_feature_levels > 1 else (3,)))


def _build_resnet(args: Namespace) -> ResNetBackbone:
    return ResNetBackbone(
        args.backbone,
        train_backbone=args.lr_backbone > 0,
        frozen_norm=args.backbone_norm == "frozen",
        dilation=args.dilation,
        stages=tuple(i + 1 for i in backbone_stages(args)),
        weights=_weights(args),
    )


def _build_swin(args: Namespace) -> SwinBackbone:
    if args.dilation:
        raise UserError(f"--dilation is for resnet50 and resnet101, not for {args.backbone}")
    return SwinBackbone(
        args.backbone,
        train_backbone=args.lr_backbone > 0,
        stages=backbone_stages(args),
        weights=_weights(args),
        drop_path_rate=args.drop_path_rate,
        use_checkpoint=args.use_checkpoint,
    )


def _weights(args: Namespace) -> str:
    """Return `--backbone_weights`; where it is not given `--pretrained_backbone_path`, if that is."""
    if args.backbone_weights == "default" and args.pretrained_backbone_path:
        return args.pretrained_backbone_path
    return args.backbone_weights


BACKBONES: dict[str, Callable[[Namespace], nn.Module]] = {
    **dict.fromkeys(RESNETS, _build_resnet),
    **dict.fromkeys(SWINS, _build_swin),
}
