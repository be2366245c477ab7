"""Class and box heads, and how a box head's offset becomes a box (Deformable-DETR, section 4.1 and appendix A.3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ops.module import at_least_float32
from util.boxes import inverse_sigmoid


class MLP(nn.Module):
    """Linear layers with ReLU in between; parameters are `layers.{i}`."""

    def __init__(self, in_features: int, hidden: int, out_features: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (num_layers - 1), out_features]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers  # torch.export of PyTorch 2.6 cannot slice a list of modules
        for layer in hidden:
            x = layer(x).relu()
        return last(x)


def shift_box(delta: Tensor, reference: Tensor, eps: float = 1e-5) -> Tensor:
    """Return boxes (..., 4) in (0, 1): the offset `delta` (..., 4) added to `reference` before the sigmoid.

    A reference of 2 numbers (a point) shifts only the centre; one of 4 numbers (a box) all four. At least in float32.
    `eps` clamps the reference (`util.boxes.inverse_sigmoid`).
    """
    delta, anchor = at_least_float32(delta), inverse_sigmoid(at_least_float32(reference), eps)
    if anchor.shape[-1] == 2:
        delta = torch.cat([delta[..., :2] + anchor, delta[..., 2:]], -1)
    else:
        delta = delta + anchor
    return delta.sigmoid()


@dataclass(frozen=True)
class Heads:
    """The heads by decoder layer; entry `dec_layers` (two-stage only) belongs to the encoder proposals."""

    class_embed: Sequence[nn.Module]
    bbox_embed: Sequence[nn.Module]


def heads_of(
    *, width: int, num_classes: int, dec_layers: int, refine: bool, two_stage: bool, share: bool = False
) -> Heads:
    """Return the heads with their published initial values.

    Without refinement, or with `share` (DINO), all layers share one pair; otherwise every layer has its own copy. In
    two-stage there is one more for the encoder. The prior of the class head is 0.01. The box size starts at sigmoid(-2)
    in the shared head or in copy 0, as it should where references are points; proposals are boxes already, so two-stage
    starts at 0. (The learned boxes of DAB are boxes too, and published with -2.)
    """
    class_head, box_head = nn.Linear(width, num_classes), MLP(width, width, 4, 3)
    nn.init.constant_(class_head.bias, -math.log((1 - 0.01) / 0.01))
    nn.init.zeros_(box_head.layers[-1].weight)
    nn.init.zeros_(box_head.layers[-1].bias)
    count = dec_layers + int(two_stage)
    if share:
        last = [copy.deepcopy(head) for head in (class_head, box_head)] * two_stage
        class_heads, box_heads = [class_head] * dec_layers + last[:1], [box_head] * dec_layers + last[1:]
    elif refine:
        class_heads = [copy.deepcopy(class_head) for _ in range(count)]
        box_heads = [copy.deepcopy(box_head) for _ in range(count)]
    else:
        class_heads, box_heads = [class_head] * count, [box_head] * count
    if not two_stage and not (share and refine):  # -2 again in every layer would make the boxes vanish
        nn.init.constant_(box_heads[0].layers[-1].bias[2:], -2.0)
    return Heads(nn.ModuleList(class_heads), nn.ModuleList(box_heads))
