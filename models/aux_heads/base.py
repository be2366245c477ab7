"""What auxiliary heads get and what they hand out (Co-DETR, section 3.2).

Everything is padded to the batch, nothing is a list per image: assigners and samplers never ask the device how many.
Boxes are xyxy in pixels of the input image, other than in the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ops.transfer import send
from util.boxes import cxcywh_to_xyxy
from util.structures import Detections, Target


@dataclass
class Pyramid:
    """Feature maps that an auxiliary head looks at, finest first."""

    maps: list[Tensor]  # (B, D, h, w)
    strides: tuple[int, ...]
    sizes: list[tuple[int, int]]  # (h, w) of each image in pixels, without padding
    usable: list[tuple[int, int]]  # (h, w): cells that begin outside have no anchors in assignment and losses
    canvas: tuple[int, int]  # (H, W) of the batch in pixels

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(h, w) of each map."""
        return [tuple(m.shape[-2:]) for m in self.maps]

    def tokens(self) -> Tensor:
        """All cells, (B, cells, D), level by level, row by row."""
        return torch.cat([m.flatten(2) for m in self.maps], 2).transpose(1, 2)


@dataclass
class Objects:
    """The annotated objects of a batch; M is the largest number in an image, at least 1."""

    labels: Tensor  # (B, M) int64, 0 where there is no object
    boxes: Tensor  # (B, M, 4), 0 where there is no object
    valid: Tensor  # (B, M) bool
    counts: list[int]  # number of objects of each image, known on the host

    @classmethod
    def of(cls, targets: Sequence[Target], sizes: Sequence[tuple[int, int]]) -> Objects:
        """Pad `targets`, whose boxes are cxcywh in [0, 1] of images of `sizes` (h, w), to one tensor."""
        counts = [len(t) for t in targets]
        most = max([1, *counts])
        device = targets[0].boxes.device
        labels = torch.zeros(len(targets), most, dtype=torch.int64, device=device)
        boxes = torch.zeros(len(targets), most, 4, device=device)
        for i, (target, (height, width)) in enumerate(zip(targets, sizes)):
            scale = send(torch.tensor((width, height, width, height)), device)
            labels[i, : counts[i]] = target.labels
            boxes[i, : counts[i]] = cxcywh_to_xyxy(target.boxes.float()) * scale
        numbers = send(torch.tensor(counts), device)
        return cls(labels, boxes, torch.arange(most, device=device) < numbers[:, None], counts)


@dataclass
class Samples:
    """What a head knows about R of its boxes (anchors, proposals): candidates for decoder queries.

    Neither positive nor negative: ignored, or not there.
    """

    boxes: Tensor  # (B, R, 4), no gradient
    positive: Tensor  # (B, R) bool
    negative: Tensor  # (B, R) bool
    target: Tensor  # (B, R) int64, index of the object of a positive, 0 elsewhere
    features: Tensor  # (B, F, D), with gradient
    feature_of: Tensor | None = None  # (R,) int64, row of `features` of each box; None: F = R, its own


@dataclass
class AuxOutput:
    """What a head returns in training."""

    losses: dict[str, Tensor]  # normalised, times the head's own weights of its terms; scalar, or (levels,)
    samples: Samples
    logits: Tensor  # (B, R, C) or, with the background last, (B, R, C + 1): classes of the boxes of `samples`
    logs: dict[str, Tensor] = field(default_factory=dict)  # only logged


class AuxHead(nn.Module):
    """A detection head with an assigner and losses of its own. One file per head, next to this one."""

    name: str

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return losses and samples for one batch."""
        raise NotImplementedError

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Detect with this head alone; boxes are clipped to the image, in pixels of the input."""
        raise NotImplementedError


def average_over_processes(count: Tensor) -> Tensor:
    """Return `count`, (), averaged over the processes of a distributed run; without one, as it is."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.detach().clone()
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count
