"""Auxiliary heads of Co-DETR: *adding a head is adding a file here* and a line to `HEADS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from models.aux_heads.atss import ATSSHead
from models.aux_heads.base import AuxHead
from models.aux_heads.faster_rcnn import FasterRCNNHead
from models.aux_heads.fcos import FCOSHead
from models.aux_heads.gfl import GFLHead
from models.aux_heads.paa import PAAHead
from models.aux_heads.retinanet import RetinaNetHead

__all__ = ["HEADS", "AuxHead", "build_aux_heads"]

# In the order in which published files count them: two-stage heads first, then dense ones.
HEADS: dict[str, Callable[..., AuxHead]] = {
    head.name: head for head in (FasterRCNNHead, ATSSHead, RetinaNetHead, FCOSHead, PAAHead, GFLHead)
}


def build_aux_heads(names: Sequence[str], *, num_classes: int, width: int, strides: Sequence[int]) -> list[AuxHead]:
    """Return the named heads in the published order; each name counts once."""
    return [
        head(num_classes=num_classes, width=width, strides=tuple(strides))
        for name, head in HEADS.items()
        if name in names
    ]
