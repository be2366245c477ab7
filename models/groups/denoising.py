"""Contrastive denoising: queries made of the objects and noise learn to find them again (DINO, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.groups.base import Context, GroupSource
from util.boxes import cxcywh_to_xyxy, inverse_sigmoid, xyxy_to_cxcywh
from util.structures import Assignment, FlatTargets, QueryGroup, Supervision

SMALL_NUMBER = 50  # below it, published DINO makes twice as many groups as asked for, however many objects there are


@dataclass
class Noise:
    """What is random about G groups of copies of T objects; on the second axis 0 is the positive copy."""

    label: Tensor  # (G, 2, T) uniform in [0, 1): which labels are replaced
    new_label: Tensor  # (G, 2, T) int64, by what
    sign: Tensor  # (G, 2, T, 4) -1 or 1: where a corner coordinate moves
    size: Tensor  # (G, 2, T, 4) uniform in [0, 1): how far


def draw_noise(groups: int, objects: int, classes: int, device: torch.device) -> Noise:
    """Draw the noise of a step. One small function on purpose: a test that replays noise replaces it."""
    shape = (groups, 2, objects)
    return Noise(
        label=torch.rand(shape, device=device),
        new_label=torch.randint(classes, shape, device=device),
        sign=torch.randint(2, (*shape, 4), device=device) * 2.0 - 1,
        size=torch.rand(*shape, 4, device=device),
    )


def number_of_groups(number: int, most: int, *, always_divide: bool) -> int:
    """Return G for images of at most `most` objects, such that positive queries are about `number`; at least 1.

    Args:
        number: `--dn_number`, at least 1.
        most: largest number of objects of an image in this process's batch; 0: there are no queries.
        always_divide: as in Co-DINO; otherwise small numbers are not divided, as in DINO's published code.
    """
    if most == 0:
        return 1
    if number < SMALL_NUMBER and not always_divide:
        return 2 * number
    return max(number // most, 1)


def noised_labels(labels: Tensor, noise: Noise, ratio: float) -> Tensor:
    """Return `labels` (T,) as (G, 2, T), a share of half the `ratio` of them replaced."""
    return torch.where(noise.label < ratio / 2, noise.new_label, labels)


def noised_boxes(boxes: Tensor, noise: Noise, scale: float) -> Tensor:
    """Return `boxes` (T, 4) cxcywh as (G, 2, T, 4): corners moved by up to `scale` half sides, negatives by up to two.

    Corners stay in the image but may change places, so sizes may be negative.
    """
    half = (boxes[:, 2:] / 2).repeat(1, 2)
    further = noise.size + torch.arange(2, device=boxes.device)[:, None, None]
    corners = cxcywh_to_xyxy(boxes) + noise.sign * further * half * scale
    return xyxy_to_cxcywh(corners.clamp(0, 1))


class Denoising(GroupSource):
    """The group `dn`: G blind groups of one positive and one negative copy of every object.

    A query sees its own group and the matching queries, which see none of these. Positives learn class and box of
    their object, negatives and the empty slots of images with fewer objects learn to be background.

    Args:
        width: D.
        num_classes: labels are replaced by one of so many.
        rows: of the table of label embeddings; published DINO has one more than classes.
        layers: of the decoder.
        number: positive queries of an image, about; decides how many groups there are.
        label_noise: twice the share of labels that are redrawn.
        box_noise: largest shift of a positive's corner, in half sides; of a negative's twice that.
        always_divide: Co-DINO's rules: see `number_of_groups`; and processes average their numbers of positive
            queries, by which losses are divided. Otherwise DINO's: they average their numbers of objects, and each
            multiplies by its own groups.
        eps: clamps noised boxes in logit space, where the published code holds them.
    """

    name = "dn"

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        rows: int,
        layers: int,
        number: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        always_divide: bool = False,
        eps: float = 1e-3,
    ) -> None:
        super().__init__()
        self.published = {"label_enc": nn.Embedding(rows, width)}
        self.num_classes, self.layers, self.number = num_classes, layers, number
        self.label_noise, self.box_noise = label_noise, box_noise
        self.always_divide, self.eps = always_divide, eps

    def forward(self, ctx: Context) -> list[QueryGroup]:
        """Return the group, without any query if no image has objects: processes must agree on the sets there are.

        Raises:
            ValueError: training without targets.
        """
        if ctx.targets is None:
            raise ValueError("denoising queries are made of targets: call the detector with targets, or in eval()")
        targets = FlatTargets.of(ctx.targets)
        most = max(targets.sizes)
        groups = number_of_groups(self.number, most, always_divide=self.always_divide)
        noise = draw_noise(groups, len(targets.labels), self.num_classes, targets.labels.device)
        content, reference = self.embed(targets, noise, most)
        taught = Supervision(self.pairs(targets, groups, most))
        group = QueryGroup(self.name, content, reference, None, (taught,), sees=("one2one",), block=2 * most or None)
        return [group]

    def embed(self, targets: FlatTargets, noise: Noise, most: int) -> tuple[Tensor, Tensor]:
        """Return content (B, 2 G M, D) and boxes (B, 2 G M, 4) of the queries, M = `most`.

        Empty slots have content 0 and the box (0.5, 0.5, 0.5, 0.5).
        """
        table = self.published["label_enc"]
        content = table(noised_labels(targets.labels, noise, self.label_noise))
        boxes = inverse_sigmoid(noised_boxes(targets.boxes.float(), noise, self.box_noise), self.eps)
        shape = (len(targets.sizes), 2 * len(noise.label) * most)
        index = self._slots(targets, len(noise.label), most)
        where = (targets.image.expand_as(index).flatten(), index.flatten())
        content = content.new_zeros(*shape, content.shape[-1]).index_put(where, content.flatten(0, 2))
        logits = boxes.new_zeros(*shape, 4).index_put(where, boxes.flatten(0, 2))
        return content, logits.sigmoid()

    def pairs(self, targets: FlatTargets, groups: int, most: int) -> Assignment:
        """Return the pairs of positives and their objects, on every decoder layer."""
        positive = self._slots(targets, groups, most)[:, 0]
        device, shape = positive.device, (self.layers, *positive.shape)
        own = torch.arange(len(targets.labels), device=device) - targets.starts[targets.image]
        return Assignment(
            layer=torch.arange(self.layers, device=device)[:, None, None].expand(shape).flatten(),
            image=targets.image.expand(shape).flatten(),
            slot=positive.expand(shape).flatten(),
            target=own.expand(shape).flatten(),
            # Published DINO averages objects over processes, Co-DINO positive queries.
            count=float(sum(targets.sizes) * (groups if self.always_divide else 1)),
            factor=1 if self.always_divide else groups,
        )

    @staticmethod
    def _slots(targets: FlatTargets, groups: int, most: int) -> Tensor:
        """Return the slot of every copy (G, 2, T): group after group, first all positives, then all negatives."""
        own = torch.arange(len(targets.labels), device=targets.labels.device) - targets.starts[targets.image]
        first = torch.arange(groups * 2, device=own.device).view(groups, 2, 1) * most
        return first + own
