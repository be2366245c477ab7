"""Auxiliary heads of Co-DETR: *adding a head is adding a file here*, a line to `HEADS`, its name to `--aux_heads`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from models.aux_heads.atss import ATSSHead
from models.aux_heads.base import AuxHead
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.fcos import FCOSHead
from models.aux_heads.gfl import GFLHead
from models.aux_heads.paa import PAAHead
from models.aux_heads.retinanet import RetinaNetHead
from models.aux_heads.roi import RoISettings
from models.parts import num_classes

__all__ = ["HEADS", "AuxHead", "build_aux_heads"]


def _faster_rcnn(args: Namespace, size: dict[str, Any]) -> AuxHead:
    finest_scale = 14.0 * size["strides"][0]  # published: 112 and 56 where the finest map has the stride 8 and 4
    return FasterRCNNHead(**size, roi=RoISettings(finest_scale, samples=args.roi_samples))


def _dense(head: Callable[..., AuxHead]) -> Callable[[Namespace, dict[str, Any]], AuxHead]:
    return lambda args, size: head(**size, stacked_convs=args.aux_convs)


# In the order in which published files count them: two-stage heads first, then dense ones.
HEADS: dict[str, Callable[[Namespace, dict[str, Any]], AuxHead]] = {
    "faster_rcnn": _faster_rcnn,
    **{head.name: _dense(head) for head in (ATSSHead, RetinaNetHead, FCOSHead, PAAHead, GFLHead)},
}


def build_aux_heads(args: Namespace, strides: Sequence[int]) -> dict[str, AuxHead]:
    """Return the heads of `--aux_heads` in the published order, for a pyramid of these `strides`.

    A head that is asked for several times is called `atss`, `atss2`, `atss3`.
    """
    size = {"num_classes": num_classes(args), "width": args.hidden_dim, "strides": tuple(strides)}
    return {
        f"{name}{number}" if number > 1 else name: build(args, size)
        for name, build in HEADS.items()
        for number in range(1, 1 + args.aux_heads.count(name))
    }
