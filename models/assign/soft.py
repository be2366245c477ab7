"""Match-free supervision: learned correspondences teach the queries ("Beyond Hungarian", arXiv 2603.08514, CAQS).

Only the abstract and second-hand descriptions of the paper are on record. `LITERAL` keeps to them; the defaults of
`SoftOptions` change what makes a young probe collapse. All layers and images go through every operation together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from models.assign import scg
from models.assign.dense import DenseCosts, PaddedTargets, PairCosts, Slots
from models.assign.health import against_optimum, duplicates, health
from models.assign.hungarian import HungarianMatcher, Request
from models.assign.pairs import Pairs, by_block, join_blocks, pairs_of_slots, pairs_of_targets
from models.assign.probe import LayerwiseProbe, Probe
from ops.transfer import send
from util.structures import Assignment

Selection = Literal["colpeak", "rowpeak", "mutual", "rounds"]
ClassTarget = Literal["weight", "hard", "quality", "pairwise"]

ENTROPY_SHARE = 0.2  # of training, over which the entropy floor falls to 0
MOST = 64  # pairs of a target with colpeak; only in crowds with flat correspondences there would be more


@dataclass(frozen=True)
class SoftOptions:
    """The readings of the record. Shares are of the whole training."""

    scg: Selection = "colpeak"  # how pairs are chosen
    scg_rho: float = 0.5  # smallest share of the peak that is kept
    scg_switch: float = 1.0  # share after which `rounds` chooses, 1 = never
    greedy_rounds: int = 8
    soft_norm: scg.Norm = "row"
    column_competition: scg.Competition = "dual"
    soft_warmup: Literal["none", "prior", "teacher"] = "prior"
    soft_warmup_share: float = 0.1
    probe_entropy: float = 0.0  # reward for undecided correspondences, falls to 0 over the first fifth
    # What loss_corr trains; full: predictions too. At first it is as large as all other losses together, and training
    # the queries with it cost the detector more than it brought (README, "Match-free supervision on drawn shapes").
    corr_grad: Literal["probe", "probe+query", "full"] = "probe"
    probe_value: Literal["cost", "prediction"] = "cost"  # what correspondences average for loss_corr
    layer_consistency: Literal["none", "last"] = "none"  # last: its pairs and weights teach all layers of a set
    live_weights: bool = False  # the query losses train the probe
    cls_target: ClassTarget = "weight"
    extra_cls: Literal["ignore", "positive"] = "ignore"  # class of pairs that are not a target's strongest
    soft_background: bool = True  # slots without a pair learn to say nothing
    soft_extra_layers: int = 0  # first decoder layers with extra positives


LITERAL = SoftOptions(
    column_competition="none", soft_warmup="none", corr_grad="full", live_weights=True, cls_target="pairwise"
)


@dataclass
class Found:
    """What became of one request, or of one of its blocks; (G, M, N) each."""

    request: Request
    slots: Slots
    targets: PaddedTargets
    valid: Tensor  # (G, M)
    costs: DenseCosts
    log_c: Tensor
    c: Tensor  # 0 in rows of padding
    kept: Tensor | None = None  # bool
    extra: Tensor | None = None  # the part of `kept` that is extra positives
    weights: Tensor | None = None  # S

    @property
    def images(self) -> int:
        return len(self.targets.sizes)

    def of_last_layer(self) -> Found:
        """Return the same with the correspondences of the last layer only, for a choice."""
        request = replace(self.request, rows=self.request.rows[-1:], layers=self.request.layers[-1:])
        rows = {name: getattr(self, name)[-self.images :] for name in ("valid", "log_c", "c")}
        return replace(self, request=request, **rows)


class SoftMatcher(nn.Module):
    """Chooses and weighs pairs by what a probe has learned, and teaches the probe.

    `repeat` k of a supervision allows a target up to k slots: its one of `rounds` and extra positives. As with k copies
    of the target, the losses are divided by k times the number of targets, so the weights of a target have the sum k;
    the class target of a pair is its weight relative to the target's largest, 1 with `hard`.

    Args:
        probe: gives the logits of correspondence; one for all layers or one for each.
        costs: of pairs, that the correspondence is taught with (`loss_corr`).
        options: see there.
        epochs: length of the training, to which shares refer.
        proposals: of the encoder's tokens, so many best ones are probed; all are background otherwise.
        teacher: Hungarian matching, needed for the warm-up `teacher`.
    """

    def __init__(
        self,
        probe: Probe | LayerwiseProbe,
        costs: PairCosts,
        options: SoftOptions,
        *,
        epochs: float,
        proposals: int = 300,
        teacher: HungarianMatcher | None = None,
    ) -> None:
        super().__init__()
        self.probe = probe
        self.costs = costs
        self.options = options
        self.epochs = epochs
        self.proposals = proposals
        self.teacher = teacher

    def forward(self, requests: Sequence[Request]) -> list[Assignment]:
        """Match every request on all its layers and images at once.

        In training nothing waits for the device, the teacher aside; in evaluation the solver is asked, to compare.

        Raises:
            ValueError: predictions without embeddings.
        """
        return [join_blocks([self._match(part) for part in by_block(request)]) for request in requests]

    def _match(self, request: Request) -> Assignment:
        with torch.autocast(request.predictions.logits.device.type, enabled=False):
            found = self.correspond(request)
            self.choose(found)
            pairs = self._pairs(found)
            return Assignment(
                pairs.layer,
                pairs.image,
                pairs.slot,
                pairs.target,
                weight=pairs.weight,
                score=pairs.score,
                ignore=self._ignored(found),
                count=self._count(found),
                losses=self._losses(found),
                logs=self._logs(found),
            )

    def correspond(self, request: Request) -> Found:
        """Return costs and dense correspondences of a request."""
        options, agnostic = self.options, request.supervision.class_agnostic
        slots = Slots.of(request, best=self.proposals if agnostic else None)
        if slots.embeds is None:
            raise ValueError(f"set {request.name}: a learned matcher looks at embeddings; these predictions have none")
        targets = PaddedTargets.of(request.targets)
        labels, boxes, valid = targets.of_layers(slots.layers)
        with torch.set_grad_enabled(torch.is_grad_enabled() and options.corr_grad == "full"):
            costs = self.costs(slots, labels, boxes)
        embeds = slots.embeds.detach() if options.corr_grad == "probe" else slots.embeds
        own = targets.labels, targets.boxes
        layers = ["encoder"] * slots.layers if _of_proposals(request) else request.layers
        logits = self.probe(embeds, slots.boxes, *own, class_agnostic=agnostic, layers=layers)
        if options.soft_warmup == "prior" and (prior := self._falling(options.soft_warmup_share, request)):
            logits = logits - prior * costs.geometry.detach()
        log_c = scg.compete(logits, valid, options.column_competition, slots.empty)
        return Found(request, slots, targets, valid, costs, log_c, log_c.exp() * valid[..., None])

    def choose(self, found: Found) -> None:
        """Fill in which pairs are kept and their weights."""
        if self.options.layer_consistency == "none":
            self._choose(found)
            return
        last = found.of_last_layer()
        self._choose(last)
        for name in ("kept", "extra", "weights"):
            own = getattr(last, name)
            setattr(found, name, None if own is None else own.repeat(found.slots.layers, 1, 1))

    def _choose(self, found: Found) -> None:
        options, supervision = self.options, found.request.supervision
        c, valid = found.c.detach(), found.valid
        if supervision.repeat > 1:
            kept = self._by_rounds(found)
            kept = scg.strongest(kept | self._extra(found, kept), c + kept, supervision.repeat)
        else:
            kept = self._by_rounds(found) if self._bids(found.request) else self._by_peak(c, valid)
            early = [layer < options.soft_extra_layers for layer in found.request.layers]
            if any(early) and not _of_proposals(found.request):
                rows = send(torch.tensor(early).repeat_interleave(found.images), c.device)
                found.extra = self._extra(found, kept) & rows[:, None, None]
                kept = kept | found.extra
        found.kept = kept
        if options.soft_norm == "row":
            found.weights = scg.row_weights(found.log_c if options.live_weights else found.log_c.detach(), kept)
        else:
            weights = torch.where(kept, found.c if options.live_weights else c, 0.0)
            found.weights = scg.normalised(weights, valid, options.soft_norm)
        found.weights = found.weights * supervision.repeat

    def _by_peak(self, c: Tensor, valid: Tensor) -> Tensor:
        if self.options.scg == "rowpeak":
            return scg.rowpeak(c, valid, self.options.scg_rho)
        kept = scg.colpeak(c, valid, self.options.scg_rho)
        return scg.strongest(kept, c, MOST) if c.shape[1] > MOST else kept

    def _by_rounds(self, found: Found) -> Tensor:
        mutual = self.options.scg == "mutual" and not self._switched(found.request)
        slot, placed, _ = scg.greedy_rounds(found.log_c, found.valid, 1 if mutual else self.options.greedy_rounds)
        return torch.zeros_like(found.c, dtype=torch.bool).scatter(2, slot[..., None], placed[..., None])

    def _extra(self, found: Found, kept: Tensor) -> Tensor:
        """Return the pairs of targets and slots that nobody has been given."""
        return scg.rowpeak(found.c.detach(), found.valid, self.options.scg_rho) & ~kept.any(1, keepdim=True)

    def _switched(self, request: Request) -> bool:
        share = 1.0 if request.time is None else request.time / self.epochs
        return self.options.scg_switch < 1 and share >= self.options.scg_switch

    def _bids(self, request: Request) -> bool:
        return self.options.scg in ("rounds", "mutual") or self._switched(request)

    def _falling(self, share: float, request: Request) -> float:
        """Return what falls linearly from 1 to 0 over the first `share` of training."""
        if request.time is None or share == 0:
            return 0.0
        return max(0.0, 1 - request.time / (share * self.epochs))

    def _pairs(self, found: Found) -> Pairs:
        """Return the pairs of non-zero weight and as few others as a number known on the host allows.

        By target: one with `rounds`; k with `repeat`; with `colpeak` M, because only M slots can be first choices, but
        at most `MOST`. By slot, each with its only target: `rowpeak` and extra positives. That costs M min(M, MOST) or
        N box losses for each image and layer in place of M N.
        """
        s, score = found.weights, self._scores(found)
        repeat, places = found.request.supervision.repeat, (found.request, found.slots, found.targets)
        by_slot = found.extra
        if repeat == 1 and not self._bids(found.request) and self.options.scg == "rowpeak":
            by_slot = found.kept
        if by_slot is not None:
            weight, target = torch.where(by_slot, s, 0.0).max(1)
            own_score = None if score is None else torch.where(weight > 0, score.gather(1, target[:, None])[:, 0], 0.0)
            pairs = pairs_of_slots(*places, target, weight, own_score)
            if by_slot is found.kept:
                return pairs
            s = torch.where(by_slot, 0.0, s)
        most = repeat if repeat > 1 or self._bids(found.request) else min(MOST, s.shape[1])
        weight, slot = s.topk(min(most, s.shape[2]), dim=2)
        own_score = None if score is None else torch.where(weight > 0, score.gather(2, slot), 0.0)
        first = pairs_of_targets(*places, slot, weight, own_score)
        return first if by_slot is None else first + pairs

    def _scores(self, found: Found) -> Tensor | None:
        """Return the targets of the class loss (G, M, N), None where they are the weights."""
        s, many = found.weights.detach(), found.request.supervision.repeat > 1
        if self.options.cls_target in ("weight", "pairwise"):
            return s / s.amax(2, keepdim=True).clamp(min=scg.EPS) if many else None
        winner = torch.zeros_like(found.kept).scatter(2, s.argmax(2, keepdim=True), True)
        ignored = self.options.extra_cls == "ignore" and not many  # one-to-many: all pairs are meant
        return torch.where(s > 0, torch.where(winner, 1.0, -1.0 if ignored else 1.0), 0.0)

    def _ignored(self, found: Found) -> Tensor | None:
        """Return which slots are left out of the class loss, (L, B, N): with `soft_background` none."""
        if self.options.soft_background:
            return None
        idle = ~found.kept.any(1) & found.valid.any(1, keepdim=True)
        if found.slots.index is not None:  # only the best proposals were looked at
            part = found.request.slots
            whole = found.valid.any(1, keepdim=True).expand(-1, part.stop - part.start)
            idle = whole.scatter(1, found.slots.index - part.start, idle)
        return idle.unflatten(0, (found.slots.layers, found.images))

    @staticmethod
    def _count(found: Found) -> float | Tensor:
        if found.request.supervision.count == "targets":
            return float(sum(found.targets.sizes) * found.request.supervision.repeat)
        return found.kept.sum() / found.slots.layers

    def _losses(self, found: Found) -> dict[str, Tensor]:
        """Return what teaches the probe, sums per layer (L,)."""
        options, request = self.options, found.request
        per_target = self._retrieved(found)
        if options.probe_entropy and (share := self._falling(ENTROPY_SHARE, request)):
            entropy = -(found.c * found.log_c).sum(2) / math.log(max(found.c.shape[2], 2))
            per_target = per_target - share * options.probe_entropy * entropy
        # Divided by the copies of all targets too, but a target has one row of correspondences.
        losses = {"loss_corr": request.supervision.repeat * per_target.view(found.slots.layers, -1).sum(1)}
        teacher = options.soft_warmup == "teacher" and not _of_proposals(request)
        if teacher and (share := self._falling(options.soft_warmup_share, request)):
            losses["loss_teacher"] = share * request.supervision.repeat * self._teach(found)
        return losses

    def _retrieved(self, found: Found) -> Tensor:
        """Return how far every target is from what its correspondences give it, (G, M), 0 for padding."""
        if self.options.probe_value == "cost":
            return (found.c * found.costs.total).sum(2)
        labels, boxes, _ = found.targets.of_layers(found.slots.layers)
        slots = found.slots if self.options.corr_grad == "full" else found.slots.detached()
        return self.costs.of_mean(found.c, slots, labels, boxes) * found.valid

    def _teach(self, found: Found) -> Tensor:
        """Return the cross-entropy of the correspondences with optimal one-to-one pairs, summed per layer (L,)."""
        request = replace(found.request, supervision=replace(found.request.supervision, repeat=1, block=None))
        (pairs,) = self.teacher([request])
        layers = {row: i for i, row in enumerate(request.rows)}
        layer = torch.tensor([layers.get(row, 0) for row in range(request.predictions.layers)])
        layer = send(layer, pairs.layer.device)[pairs.layer]
        group = layer * found.images + pairs.image
        taught = found.log_c[group, pairs.target, pairs.slot - request.slots.start]
        return taught.new_zeros(found.slots.layers).index_add(0, layer, -taught)

    def _logs(self, found: Found) -> dict[str, Tensor]:
        """Return the measures of the last layer."""
        last = slice(-found.images, None)
        c, weights = found.c[last].detach(), found.weights[last].detach()
        logs = health(found.kept[last], found.targets.valid, c)
        if _of_proposals(found.request) or found.request.supervision.repeat > 1:
            return logs
        logs["dup"] = duplicates(found.slots.logits[last], found.slots.boxes[last], found.targets)
        if not self.training:
            logs |= against_optimum(weights, self.matching_costs(found)[last], found.request.targets)
        return logs

    @torch.no_grad()
    def matching_costs(self, found: Found) -> Tensor:
        """Return the costs (G, M, N) of Hungarian matching, also where the correspondence is taught with others."""
        if not self.costs.all_classes:
            return found.costs.total.detach()
        labels, boxes, _ = found.targets.of_layers(found.slots.layers)
        return replace(self.costs, all_classes=False)(found.slots, labels, boxes).total


def _of_proposals(request: Request) -> bool:
    """Say whether a request is about proposals of the encoder, whose layer is none of the decoder's."""
    return request.supervision.assign == "proposals" or request.supervision.class_agnostic
