"""`--compile`: the parts of a detector that are worth compiling, each by itself; and `--channels_last`.

Compiled are the backbone and every layer of encoders and decoders: they take nearly all of the time, get tensors only,
and all layers of a kind share one compiled program. Matching, losses and what makes queries stay as they are: they are
small, and their shapes follow the objects of the images. Sizes are dynamic, so that another image size compiles nothing
anew after the first few. Names in state dicts do not change.
"""

from __future__ import annotations

import torch
from torch import nn

from models.decoder import DecoderLayer
from models.encoder import EncoderLayer


def compile_parts(model: nn.Module, backend: str = "inductor") -> list[nn.Module]:
    """Compile the costly parts of a detector in place, on first use; return them.

    Args:
        model: of `models.build_detector`; further encoders and decoders of its query groups are compiled too.
        backend: of torch.compile.
    """
    layers = [module for module in model.modules() if isinstance(module, (EncoderLayer, DecoderLayer))]
    parts = [model.backbone[0], *layers]
    for part in parts:
        part.compile(dynamic=True, backend=backend)
    return parts


def prepare(model: nn.Module, *, channels_last: bool = False, compiled: bool = False) -> nn.Module:
    """Return the detector, made ready for its device as `--channels_last` and `--compile` say; names stay.

    Args:
        channels_last: the backbone's weights, and so its maps, keep the channels of a pixel side by side.
        compiled: see `compile_parts`.
    """
    if channels_last:
        model.backbone[0].to(memory_format=torch.channels_last)
    if compiled:
        compile_parts(model)
    return model
