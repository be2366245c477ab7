"""Matching by cost in rounds of bids, on the device: no solver and nothing learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.assign.dense import DenseCosts, PaddedTargets, PairCosts, Slots
from models.assign.health import against_optimum, duplicates
from models.assign.hungarian import Request
from models.assign.pairs import by_block, join_blocks, pairs_of_targets
from models.assign.scg import NEG, greedy_rounds
from util.structures import Assignment


class GreedyMatcher(nn.Module):
    """Every target bids for its cheapest free slot, the cheapest bid wins; `repeat` k: k times over.

    The control of match-free supervision: it does without a solver too. A module for its mode only: in evaluation it
    also compares itself with the solver.

    Args:
        costs: of pairs.
        rounds: of bids; a target that is not served by then stays without a slot in this step.
    """

    def __init__(self, costs: PairCosts, *, rounds: int = 8) -> None:
        super().__init__()
        self.costs = costs
        self.rounds = rounds

    @torch.no_grad()
    def forward(self, requests: Sequence[Request]) -> list[Assignment]:
        """Match every request on all its layers and images at once, without waiting for the device.

        Returns:
            k pairs for every target and layer, of weight 1, or 0 where the target got no slot.
        """
        return [join_blocks([self._match(part) for part in by_block(request)]) for request in requests]

    def _match(self, request: Request) -> Assignment:
        slots, targets = Slots.of(request, embeds=False), PaddedTargets.of(request.targets)
        labels, boxes, valid = targets.of_layers(slots.layers)
        costs = self.costs(slots, labels, boxes)
        scores = -costs.total
        if slots.empty is not None:
            scores = scores.masked_fill(slots.empty[:, None], NEG)
        taken, chosen, placed = None, [], []
        for _ in range(request.supervision.repeat):
            slot, has, taken = greedy_rounds(scores, valid, self.rounds, taken)
            chosen.append(slot)
            placed.append(has)
        slot, has = torch.stack(chosen, -1), torch.stack(placed, -1)
        pairs = pairs_of_targets(request, slots, targets, slot, has.float())
        count = float(sum(targets.sizes) * request.supervision.repeat)
        if request.supervision.count == "positives":
            count = has.sum() / slots.layers
        logs = self._logs(request, slots, targets, costs, slot, has)
        return Assignment(pairs.layer, pairs.image, pairs.slot, pairs.target, pairs.weight, count=count, logs=logs)

    def _logs(
        self, request: Request, slots: Slots, targets: PaddedTargets, costs: DenseCosts, slot: Tensor, has: Tensor
    ) -> dict[str, Tensor]:
        images = len(targets.sizes)
        left = (targets.valid & ~has[-images:].any(-1)).sum() / targets.valid.sum().clamp(min=1)
        if request.supervision.class_agnostic or request.supervision.repeat > 1:
            return {"unassigned": left}
        logs = {"unassigned": left, "dup": duplicates(slots.logits[-images:], slots.boxes[-images:], targets)}
        if not self.training:
            weights = torch.zeros_like(costs.total).scatter_add(2, slot, has.float())
            logs |= against_optimum(weights[-images:], costs.total[-images:], request.targets)
        return logs
