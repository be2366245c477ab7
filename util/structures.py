"""The data types that travel through the detector.

Shape letters: `B` images in the batch, `L` decoder layers, `Q` queries of a group, `N` predictions of any set, `M`
targets of one image, `S` encoder tokens, `D` hidden size, `C` classes, `P` matched pairs.

All boxes inside the model are `cxcywh`, divided by the size of the *unpadded* image, so in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn

from ops.transfer import send
from util.pixels import normalize

LevelShapes = tuple[tuple[int, int], ...]
# What supervisions ask an assigner for: decoder queries or encoder proposals. Flags say which assigner serves which.
Role = Literal["queries", "proposals"]


def _move(value, device: torch.device | str, non_blocking: bool):
    if isinstance(value, Tensor):
        return send(value, device) if non_blocking else value.to(device)
    return value


class _Movable:
    """Adds `.to(device)` to a dataclass; every tensor field moves, everything else stays."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        moved = {f.name: _move(getattr(self, f.name), device, non_blocking) for f in fields(self)}
        return replace(self, **moved)


@dataclass
class ImageBatch(_Movable):
    """Images in the top-left corners of one canvas."""

    pixels: Tensor  # (B, 3, H, W) uint8 RGB as loaded; or float, then normalised and zero at padding
    padding: Tensor  # (B, H, W) bool, True where there is no image
    sizes: list[tuple[int, int]]  # (h, w) of each image inside the canvas, python ints

    def __len__(self) -> int:
        return len(self.sizes)

    def pin_memory(self) -> ImageBatch:
        return replace(self, pixels=self.pixels.pin_memory(), padding=self.padding.pin_memory())

    def normalized(self) -> ImageBatch:
        """Return the batch with normalised float pixels, exactly zero at padding; a float batch is returned as it is.

        The detector calls it, so that whoever has a batch may hand it over as it came from the loader.
        """
        if self.pixels.is_floating_point():
            return self
        return replace(self, pixels=normalize(self.pixels).masked_fill_(self.padding[:, None], 0.0))


@dataclass
class Target(_Movable):
    """The annotated objects of one image; M may be 0 and every tensor then keeps its rank."""

    labels: Tensor  # (M,) int64, class index of the model (contiguous, or raw category ids in the 91-slot mode)
    boxes: Tensor  # (M, 4) cxcywh in [0, 1]
    image_id: int
    orig_size: tuple[float, float]  # (h, w) that boxes are relative to, in pixels of the file, for evaluation
    size: tuple[int, int] = (0, 0)  # (h, w) after augmentation, before padding
    area: Tensor | None = None  # (M,) pixels of the augmented image
    iscrowd: Tensor | None = None  # (M,) bool; crowd regions never reach a training target
    masks: Tensor | None = None  # (M, h, w) bool at the size after augmentation
    keypoints: Tensor | None = None  # (M, K, 3)
    track_ids: Tensor | None = None  # (M,)

    def __len__(self) -> int:
        return len(self.labels)

    def file_area(self) -> Tensor:
        """Return the areas (M,) in pixels of the file, as COCO sorts objects by size; of the boxes if none is given."""
        height, width = self.orig_size
        if self.area is None or 0 in self.size:
            return self.boxes[:, 2:].float().prod(1) * (height * width)
        return self.area * (height * width / (self.size[0] * self.size[1]))

    def pin_memory(self) -> Target:
        pinned = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in pinned.items() if isinstance(v, Tensor)})


@dataclass
class FlatTargets:
    """The targets of a batch, one image after the other: M is their number in all images."""

    labels: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) cxcywh in [0, 1]
    image: Tensor  # (M,) int64, index in the batch
    starts: Tensor  # (B,) int64, index of the first target of each image
    sizes: list[int]  # number of targets of each image
    image_ids: list[int]
    source: Sequence[Target] = ()  # what was laid flat

    @classmethod
    def of(cls, targets: Sequence[Target]) -> FlatTargets:
        """Lay `targets` flat."""
        labels, boxes = torch.cat([t.labels for t in targets]), torch.cat([t.boxes for t in targets])
        sizes = [len(t) for t in targets]
        image = [i for i, size in enumerate(sizes) for _ in range(size)]
        starts = [0, *accumulate(sizes)][:-1]
        index = send(torch.tensor(image + starts, dtype=torch.int64), labels.device)
        ids = [t.image_id for t in targets]
        return cls(labels, boxes, *index.split([len(image), len(starts)]), sizes, ids, targets)

    def file_area(self) -> Tensor:
        """Return the areas (M,) in pixels of the files."""
        return torch.cat([t.file_area() for t in self.source])


@dataclass
class Memory:
    """Encoder output, flattened over levels (level by level, row-major)."""

    tokens: Tensor  # (B, S, D)
    padding: Tensor  # (B, S) bool
    shapes: LevelShapes  # (h, w) per level as python ints: no device synchronisation
    valid_ratios: Tensor  # (B, levels, 2) x, y share of each level that is image

    def maps(self) -> list[Tensor]:
        """Return the tokens as maps again, [(B, D, h, w)] per level."""
        levels = self.tokens.transpose(1, 2).split([h * w for h, w in self.shapes], dim=2)
        return [level.unflatten(2, shape) for level, shape in zip(levels, self.shapes)]


@dataclass
class Predictions:
    """What the heads say about a set of slots; there is a leading L even when L = 1."""

    logits: Tensor  # (L, B, N, C)
    boxes: Tensor  # (L, B, N, 4) cxcywh in [0, 1]
    padding: Tensor | None = None  # (B, N) True = empty slot, neither positive nor negative
    # [(B, N, D)] per layer: what the heads saw. Not stacked: most training schemes never look.
    embeds: Sequence[Tensor] | None = None

    @property
    def layers(self) -> int:
        return self.logits.shape[0]

    def select_layers(self, layers: Sequence[int]) -> Predictions:
        """Return the predictions of the decoder layers `layers` only."""
        if list(layers) == list(range(self.layers)):
            return self

        def pick(values: Tensor) -> Tensor:
            return torch.stack([values[i] for i in layers])  # indexing with a list would wait for the device

        embeds = None if self.embeds is None else [self.embeds[i] for i in layers]
        return Predictions(pick(self.logits), pick(self.boxes), self.padding, embeds)


@dataclass
class Assignment:
    """Matched pairs of one set, flat: no list of index pairs per image."""

    layer: Tensor  # (P,) int64, index into the supervised layers
    image: Tensor  # (P,) int64
    slot: Tensor  # (P,) int64, index into the set; what an assigner returns counts in the predictions it was given
    target: Tensor  # (P,) int64, index into the targets of that image
    weight: Tensor | None = None  # (P,), None = 1, 0 = no pair at all; may carry gradient (soft matching)
    ignore: Tensor | None = None  # (L, B, N) slots left out of the class loss
    count: float | Tensor = 0.0  # local number the losses are divided by, once averaged over processes
    factor: int = 1  # of this process: the averaged count is multiplied by it
    losses: dict[str, Tensor] = field(default_factory=dict)  # (L,) each, the assigner's own: sums like all losses
    logs: dict[str, Tensor] = field(default_factory=dict)  # scalars that are only logged
    score: Tensor | None = None  # (P,) target of the pair's class, None = `weight`, -1 = left out of the class loss

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Supervision:
    """How a set of predictions is taught."""

    assign: Role | Assignment = "queries"  # whose assigner of the criterion, or ready-made pairs
    layers: range | None = None  # decoder layers it teaches; None = all
    weight: float = 1.0  # lambda of the scheme
    repeat: int = 1  # k: a target may be matched k times
    block: int | None = None  # cut the slots into blocks of this size, each matched with all targets on its own
    class_agnostic: bool = False  # two-stage: all targets are class 0
    count: Literal["targets", "positives"] = "targets"  # targets x repeat, or the number of matched pairs
    terms: tuple[str, ...] = ("labels", "boxes")

    def copies(self, slots: int) -> int:
        """Return how often a target may be matched among so many slots of a layer."""
        return self.repeat * -(-slots // (self.block or max(slots, 1)))


@dataclass
class QueryGroup:
    """Decoder queries + a visibility rule + how they are supervised."""

    name: str  # "one2one", "one2many", "dn", "co_atss"
    content: Tensor  # (B, Q, D)
    reference: Tensor  # (B, Q, 2) points or (B, Q, 4) boxes, in (0, 1)
    pos: Tensor | None  # (B, Q, D) the query position, the same in every layer; None: the decoder makes it of boxes
    supervision: tuple[Supervision, ...]
    sees: tuple[str, ...] = ()  # other groups it may attend to (its own block always)
    block: int | None = None  # split the group into blocks of this size, blind to each other
    padding: Tensor | None = None  # (B, Q) True = empty slot

    def __len__(self) -> int:
        return self.content.shape[1]


@dataclass(frozen=True)
class Claim:
    """What a group source wants of the first queries."""

    start: int  # its first row of the table of learned queries, and its first rank unless `rank` says another
    count: int
    scorer: nn.Module | None = None  # (B, S, D) -> (B, S, C): ranks the proposals in place of the shared class head
    rank: int | None = None

    @property
    def rows(self) -> slice:
        """Its rows of the table."""
        return slice(self.start, self.start + self.count)

    @property
    def ranks(self) -> slice:
        """Its places in the ranking of proposals."""
        first = self.start if self.rank is None else self.rank
        return slice(first, first + self.count)


@dataclass
class Seeds:
    """Ranked first queries of the decoder, best first, and what was predicted while ranking them."""

    content: Tensor  # (B, K, D)
    pos: Tensor | None  # (B, K, D); None: the decoder makes it of boxes
    reference: Tensor  # (B, K, 2 or 4) in (0, 1)
    encoder: Predictions | None = None  # two-stage: scores and boxes of the tokens that are taught as proposals


@dataclass
class TargetPairs:
    """Targets gathered by an assignment, aligned with its P pairs."""

    labels: Tensor  # (P,) int64
    boxes: Tensor  # (P, 4) cxcywh


@dataclass
class SupervisedSet:
    """Predictions that are supervised together and how: `encoder`, `one2one`, `one2many`, `dn`, ...

    Sets that were decoded together are cut out of one `stack`. Costs and losses are evaluated once on the stack, not
    once for each set; without a stack the set stands alone.
    """

    predictions: Predictions
    supervision: tuple[Supervision, ...]
    stack: Predictions | None = None
    start: int = 0  # the first slot of this set in `stack`

    def __post_init__(self) -> None:
        if self.stack is None:
            self.stack = self.predictions


@dataclass
class DetectorOutput:
    """Everything the detector says about a batch. `sets["one2one"]` is what inference uses."""

    sets: dict[str, SupervisedSet]
    aux_losses: dict[str, Tensor] = field(default_factory=dict)  # of auxiliary heads, already normalised and weighted
    aux_logs: dict[str, Tensor] = field(default_factory=dict)  # of auxiliary heads, only logged
    # Of auxiliary heads on their own, by head and image; boxes xyxy relative to the image.
    aux_detections: dict[str, list[Detections]] = field(default_factory=dict)

    @property
    def pred_logits(self) -> Tensor:
        """(B, Q, C) logits of the last decoder layer, one-to-one queries."""
        return self.sets["one2one"].predictions.logits[-1]

    @property
    def pred_boxes(self) -> Tensor:
        """(B, Q, 4) cxcywh in [0, 1] of the last decoder layer, one-to-one queries."""
        return self.sets["one2one"].predictions.boxes[-1]


@dataclass
class LossReport:
    """What the criterion returns."""

    total: Tensor  # scalar to back-propagate
    terms: dict[str, Tensor]  # detached scalars, keys as the family's logs know them, before the term weights
    weights: dict[str, float]  # weight of each entry of `terms` in the total; log-only entries are absent
    # In evaluation: (M,) int64, the query of every target, one image after the other, on the last layer; -1 = none.
    chosen: Tensor | None = None


@dataclass
class Detections(_Movable):
    """Final detections of one image, best first."""

    scores: Tensor  # (K,)
    labels: Tensor  # (K,) int64, class index of the model
    boxes_px: Tensor  # (K, 4) xyxy in pixels of the original file
    image_id: int = -1
    masks: Tensor | None = None  # (K, h, w) bool
