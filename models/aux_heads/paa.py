"""PAA as an auxiliary head: a mixture model splits the candidates of an object (Kim and Lee 2020).

An anchor is good for an object when the network finds it easy. The candidates' costs are fitted by two Gaussians; those
of the cheap one, up to its densest point, are positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from models.aux_heads.anchors import AnchorGrid, DeltaCoder, assign_max_iou, giou_loss, paired_iou, pairwise_iou
from models.aux_heads.base import AuxOutput, Objects, Pyramid, Samples, average_over_processes
from models.aux_heads.dense import (
    LEAST_IOU,
    DenseHead,
    Scale,
    detect,
    flatten,
    objects_of,
    one_hot,
    predictor,
)
from util.structures import Detections

MAX_ROUNDS = 100  # of expectation and maximisation
TOLERANCE = 1e-3  # a fit is finished when the mean log-likelihood changes by less
VARIANCE_FLOOR = 1e-6  # added to every variance


class PAAHead(DenseHead):
    """ATSS-shaped head with an IoU branch; one square anchor of 8 strides per cell.

    Args:
        num_classes: C.
        width: channels of pyramid and towers, a multiple of 32.
        strides: of the levels.
        stacked_convs: convolutions of each tower.
        topk: candidates of an object in each level.
        class_weight, box_weight, iou_weight: of the three losses; the first two also weigh the cost of a candidate.
    """

    name = "paa"

    def __init__(
        self,
        *,
        num_classes: int,
        width: int = 256,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        stacked_convs: int = 1,
        topk: int = 9,
        class_weight: float = 1.0,
        box_weight: float = 1.3,
        iou_weight: float = 0.5,
    ) -> None:
        grid = AnchorGrid(strides, scales=(8,), ratios=(1.0,))
        super().__init__(num_classes=num_classes, width=width, grid=grid, stacked_convs=stacked_convs, norm=True)
        self.topk, self.coder = topk, DeltaCoder((0.1, 0.1, 0.2, 0.2))
        self.class_weight, self.box_weight, self.iou_weight = class_weight, box_weight, iou_weight
        self.atss_cls = predictor(width, num_classes)
        self.atss_reg = predictor(width, 4)
        self.atss_centerness = predictor(width, 1)  # the published name; it predicts the IoU
        self.scales = nn.ModuleList(Scale() for _ in strides)
        self.initialise(self.atss_cls)

    def forward(self, pyramid: Pyramid, objects: Objects) -> AuxOutput:
        """Return the scalar losses `loss_cls`, `loss_bbox` and `loss_iou`, and the anchors as samples."""
        logits, deltas, quality = self._outputs(pyramid)
        anchors, usable, counts = self.place(pyramid)
        decoded = self.coder.decode(anchors, deltas)
        target, positive = self._assign(anchors, usable, counts, logits, decoded, objects)
        labels, boxes = objects_of(target, objects)

        focal = sigmoid_focal_loss(logits, one_hot(labels, positive, self.num_classes)).sum(-1) * usable
        iou = paired_iou(decoded.detach(), boxes) * positive
        giou = giou_loss(decoded, boxes) * iou
        entropy = F.binary_cross_entropy_with_logits(quality, iou, reduction="none") * positive
        count = average_over_processes(positive.sum().float())
        losses = {
            "loss_cls": self.class_weight * focal.sum() / count.clamp(min=len(logits)),
            "loss_bbox": self.box_weight * giou.sum() / average_over_processes(iou.sum()).clamp(min=1e-6),
            "loss_iou": self.iou_weight * entropy.sum() / count.clamp(min=1),
        }
        samples = Samples(anchors * usable[..., None], positive, ~positive, target, pyramid.tokens())
        return AuxOutput(losses, samples, logits)

    def predict(self, pyramid: Pyramid) -> list[Detections]:
        """Return the detections of each image, best first, at most 100. NMS waits for the device."""
        logits, deltas, quality = self._outputs(pyramid)
        anchors, _, counts = self.place(pyramid)
        boxes = self.coder.decode(anchors, deltas)
        return detect(logits.sigmoid(), boxes, counts, pyramid, quality=quality.sigmoid(), nms_iou=0.6)

    @torch.no_grad()
    def _assign(
        self, anchors: Tensor, usable: Tensor, counts: list[int], logits: Tensor, decoded: Tensor, objects: Objects
    ) -> tuple[Tensor, Tensor]:
        """Return target and positive, (B, R) each: candidates by IoU, then the split by cost."""
        target, positive, _ = assign_max_iou(
            pairwise_iou(anchors[None], objects.boxes),
            objects.valid,
            usable,
            positive=0.1,
            negative=0.1,
            min_positive=LEAST_IOU,
            low_quality=True,
        )
        labels, boxes = objects_of(target, objects)
        focal = sigmoid_focal_loss(logits, one_hot(labels, positive, self.num_classes)).sum(-1)
        cost = self.class_weight * focal + self.box_weight * giou_loss(decoded, boxes)
        positive = split_candidates(cost, target, positive, counts, objects=objects.labels.shape[1], topk=self.topk)
        return torch.where(positive, target, 0), positive

    def _outputs(self, pyramid: Pyramid) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits (B, R, C), deltas (B, R, 4) and IoU logits (B, R)."""
        classes, boxes = self.towers(pyramid)
        logits = flatten([self.atss_cls(x) for x in classes], self.num_classes)
        deltas = flatten([scale(self.atss_reg(x)) for scale, x in zip(self.scales, boxes)], 4)
        return logits, deltas, flatten([self.atss_centerness(x) for x in boxes], 1).squeeze(-1)


@torch.no_grad()
def split_candidates(
    cost: Tensor, target: Tensor, candidate: Tensor, counts: Sequence[int], *, objects: int, topk: int
) -> Tensor:
    """Return the positives (B, R) among the candidates: of each object the cheap ones of its cheapest (section 3.2).

    Args:
        cost: (B, R), of each candidate for its own object.
        target: (B, R) int64, object of each candidate.
        candidate: (B, R) bool.
        counts: anchors of each level, R in all.
        objects: M.
        topk: so many of the cheapest of each level take part in the fit.
    """
    own = (target[:, None] == torch.arange(objects, device=cost.device)[:, None]) & candidate[:, None]
    costs, chosen, first = [], [], 0
    for level in torch.where(own, cost[:, None], torch.inf).split(list(counts), dim=2):  # (B, M, n)
        cheapest, index = level.topk(min(topk, level.shape[2]), dim=2, largest=False)
        costs.append(cheapest)
        chosen.append(index + first)
        first += level.shape[2]
    costs, order = torch.cat(costs, 2).sort(2)
    index = torch.cat(chosen, 2).gather(2, order)
    kept = cheap_part(costs.flatten(0, 1), costs.flatten(0, 1) < torch.inf)
    votes = torch.zeros(cost.shape, dtype=torch.int32, device=cost.device)
    return votes.scatter_add_(1, index.flatten(1), kept.view(len(cost), -1).int()) > 0


@torch.no_grad()
def cheap_part(costs: Tensor, there: Tensor) -> Tensor:
    """Return (N, K) bool, the costs of the cheap Gaussian up to where the mixture is densest.

    Args:
        costs: (N, K), N problems of at most K costs, in ascending order.
        there: (N, K) bool, the entries that exist. A problem with fewer than two keeps none.
    """
    x = torch.where(there, costs, 0.0).double()  # the variances are differences of nearly equal numbers
    parts = fit_two_gaussians(x, there)
    total = parts.logsumexp(-1)
    cheap = there & (parts[..., 0] >= parts[..., 1])
    densest = total.masked_fill(~cheap, -torch.inf).argmax(1, keepdim=True)
    rank = torch.arange(costs.shape[1], device=costs.device)
    return cheap & (rank <= densest) & (there.sum(1, keepdim=True) >= 2)


def fit_two_gaussians(x: Tensor, there: Tensor) -> Tensor:
    """Fit a mixture of two Gaussians to each row; return log(weight * density) of both at each entry, (N, K, 2).

    Expectation maximisation: means start at the least and the greatest number, variances at 1, weights at 1/2. A row
    stops after the round whose expectation changed its mean log-likelihood by less than 1e-3. All rows go through all
    `MAX_ROUNDS`, finished ones unchanged, because to ask whether some are left would wait for the device.

    Args:
        x: (N, K) float64, 0 where there is nothing.
        there: (N, K) bool, the entries that count.
    """
    weight = there.to(x.dtype)
    number = weight.sum(1, keepdim=True).clamp(min=1)
    least = x.masked_fill(~there, torch.inf).amin(1)
    greatest = x.masked_fill(~there, -torch.inf).amax(1)
    means = torch.stack([least, greatest], -1).masked_fill(~there.any(1, keepdim=True), 0.0)
    variances, shares = torch.ones_like(means), torch.full_like(means, 0.5)
    likelihood = x.new_full((len(x), 1), -torch.inf)
    running = torch.ones_like(likelihood, dtype=torch.bool)
    for _ in range(MAX_ROUNDS):
        parts = _log_parts(x, means, variances, shares)
        total = parts.logsumexp(-1)
        before, likelihood = likelihood, (total * weight).sum(1, keepdim=True) / number
        member = (parts - total[..., None]).exp() * weight[..., None]  # (N, K, 2)
        mass = member.sum(1) + 1e-14  # a part may lose all its members
        new_means = (member * x[..., None]).sum(1) / mass
        spread = (member * (x[..., None] - new_means[:, None]).square()).sum(1) / mass
        means = torch.where(running, new_means, means)
        variances = torch.where(running, spread + VARIANCE_FLOOR, variances)
        shares = torch.where(running, mass / number, shares)
        running = running & ((likelihood - before).abs() >= TOLERANCE)
    return _log_parts(x, means, variances, shares)


def _log_parts(x: Tensor, means: Tensor, variances: Tensor, shares: Tensor) -> Tensor:
    """Return log(share * density), (N, K, 2), of `x` (N, K) under Gaussians of (N, 2) parameters."""
    squared = (x[..., None] - means[:, None]).square() / variances[:, None]
    return shares.log()[:, None] - 0.5 * (squared + (2 * math.pi * variances).log()[:, None])
