"""Matchers that are compared by `util.bench_match`: what they get, and how long they and the losses take."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor
from torchvision.ops import generalized_box_iou

from models import build_criterion
from models.assign import Assigner, HungarianMatcher, Request
from models.assign.costs import class_cost
from models.criterion import Criterion
from util.arg_rules import SOFT_ONLY
from util.bench_common import Samples, random_boxes, random_targets, total_loss, waiter
from util.boxes import cxcywh_to_xyxy
from util.idle_flags import idle_flags
from util.rng import seed_everything
from util.structures import (
    Assignment,
    DetectorOutput,
    FlatTargets,
    Predictions,
    SupervisedSet,
    Supervision,
    Target,
)

PUBLISHED, OURS, GREEDY, SOFT = "hungarian-published", "hungarian", "cost-greedy", "soft"
# What makes each matcher. Other flags come from the command line where the matcher knows them.
MATCHERS: dict[str, dict[str, str]] = {
    PUBLISHED: {"matcher": "hungarian"},
    OURS: {"matcher": "hungarian"},
    GREEDY: {"matcher": "cost-greedy"},
    SOFT: {"matcher": "soft"},
    "soft-literal": {"matcher": "soft-literal"},
    "soft-rounds": {"matcher": "soft", "scg": "rounds"},
}
REGIONS = {
    "match_ms": "match_ms: from predictions and objects to weighted pairs",
    "loss_ms": "loss_ms: losses and backward pass",
    "match_cuda_ms": "match_ms between CUDA events",
    "loss_cuda_ms": "loss_ms between CUDA events",
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
SAME = 1e-4  # difference of the costs per pair from which hungarian and hungarian-published differ


class PublishedMatcher:
    """Hungarian matching as DETR and Deformable-DETR published it: one layer after the other, a copy for each.

    Args:
        ours: whose weights it takes.
    """

    def __init__(self, ours: HungarianMatcher) -> None:
        self.ours = ours

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[Assignment]:
        """Match every request, each object once."""
        return [self._match(request) for request in requests]

    def _match(self, request: Request) -> Assignment:
        sizes, device = request.targets.sizes, request.predictions.logits.device
        layers = []
        for row in request.rows:
            images = self._costs(request, row).cpu().split(sizes, -1)
            # Through the module: the benchmark of whole steps looks there for the time of the solver.
            found = [optimize.linear_sum_assignment(cost[image]) for image, cost in enumerate(images)]
            pairs = [(np.full_like(slots, image), slots, own) for image, (slots, own) in enumerate(found)]
            image, slot, target = np.concatenate([np.stack(part) for part in pairs], 1)
            known = np.stack([np.full_like(image, row), image, slot + request.slots.start, target])
            layers.append(torch.from_numpy(known).to(device))
        return Assignment(*torch.cat(layers, 1), count=float(sum(sizes)))

    def _costs(self, request: Request, row: int) -> Tensor:
        """Return (B, N, M): the slots of every image against the objects of all images."""
        logits, boxes = (x[row, :, request.slots] for x in (request.predictions.logits, request.predictions.boxes))
        targets, images, slots = request.targets, len(logits), boxes.shape[1]
        logits, boxes = logits.flatten(0, 1).float(), boxes.flatten(0, 1).float()
        classes = class_cost(logits)[:, targets.labels]
        distance = torch.cdist(boxes, targets.boxes, p=1)
        overlap = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes))
        weights = self.ours
        costs = weights.cost_class * classes + weights.cost_bbox * distance - weights.cost_giou * overlap
        return costs.view(images, slots, -1)


def published_loss(criterion: Criterion, output: DetectorOutput, targets: list[Target]) -> Tensor:
    """Return the total with every Hungarian matcher of `criterion` replaced by the published form."""
    own = criterion.assigners
    criterion.assigners = {role: _published(assigner) for role, assigner in own.items()}
    try:
        return total_loss(criterion, output, targets)
    finally:
        criterion.assigners = own


def _published(assigner: Assigner) -> Assigner:
    return PublishedMatcher(assigner) if isinstance(assigner, HungarianMatcher) else assigner


@dataclass
class Inputs:
    """What is matched: predictions, all leaves, and the objects of each image."""

    predictions: Predictions
    targets: list[Target]

    @property
    def leaves(self) -> list[Tensor]:
        return [self.predictions.logits, self.predictions.boxes, *self.predictions.embeds]


def make_inputs(
    counts: Sequence[int],
    *,
    layers: int,
    queries: int,
    classes: int,
    width: int,
    trained: bool,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Return predictions for images with so many objects each, and the objects.

    Args:
        width: D, of the embeddings, which are noise.
        trained: about half of the queries know an object, one of them well (box and class), the same ones on all
            layers; the others are background. The solver is quicker with such costs. Otherwise all is noise.
    """
    targets = random_targets(counts, classes)
    boxes = random_boxes(layers, len(counts), queries)
    logits = torch.randn(layers, len(counts), queries, classes) - (4 if trained else 2)
    for image, target in enumerate(targets if trained else ()):
        if len(target):
            _teach(boxes[:, image], logits[:, image], target)
    embeds = [torch.randn(len(counts), queries, width).to(device).requires_grad_() for _ in range(layers)]
    leaves = (x.to(device).requires_grad_() for x in (logits, boxes))
    return Inputs(Predictions(*leaves, embeds=embeds), [target.to(device) for target in targets])


def _teach(boxes: Tensor, logits: Tensor, target: Target) -> None:
    """Let half of the queries of one image, boxes (L, N, 4) and logits (L, N, C), find objects; in place."""
    layers, queries = boxes.shape[:2]
    slot = torch.randperm(queries)[: max(queries // 2, min(queries, len(target)))]
    own = torch.arange(len(slot)) % len(target)
    best = torch.arange(len(slot)) < len(target)  # one for each object
    found = target.boxes[own]
    noise = torch.where(best, 0.05, 0.2)[:, None] * found[:, 2:].repeat(1, 2) * torch.randn(layers, len(slot), 4)
    boxes[:, slot] = (found + noise).clamp(0.01, 0.99)
    logits[:, slot, target.labels[own]] += torch.where(best, 5.0, 2.0)


@dataclass
class Contender:
    """A matcher with the criterion that it has in training."""

    name: str
    matcher: Assigner
    criterion: Criterion

    def match(self, inputs: Inputs) -> Assignment:
        """Return the weighted pairs of all layers and images."""
        request = Request("one2one", inputs.predictions, FlatTargets.of(inputs.targets), Supervision())
        return self.matcher([request])[0]

    def backward(self, inputs: Inputs, assignment: Assignment) -> None:
        """Compute the losses of pairs that are ready, and all gradients."""
        supervised = SupervisedSet(inputs.predictions, (Supervision(assign=assignment),))
        self.criterion(DetectorOutput({"one2one": supervised}), inputs.targets).total.backward()

    def start_anew(self, inputs: Inputs) -> None:
        """Forget gradients."""
        for leaf in (*inputs.leaves, *self.criterion.parameters()):
            leaf.grad = None


def args_of(args: Namespace, name: str) -> Namespace:
    """Return `args` with the matcher `name`, without flags that this matcher does not know or that change nothing.

    What makes the matcher wins over `args`: `soft-rounds` has rounds with `--scg rowpeak` too.
    """
    given = {**vars(args), **MATCHERS[name]}
    if not given["matcher"].startswith("soft"):
        given |= dict.fromkeys(SOFT_ONLY)
        if args.cls_target in ("weight", "pairwise"):  # there are no weights
            given["cls_target"] = None
    nothing = {flag: 1.0 if flag == "corr_loss_coef" else None for flag in idle_flags(Namespace(**given))}
    return Namespace(**given | nothing)


def contenders(args: Namespace, names: Sequence[str], device: torch.device | str = "cpu") -> list[Contender]:
    """Return the matchers `names` with their criteria."""
    found = []
    for name in names:
        seed_everything(args.seed)
        criterion = build_criterion(args_of(args, name)).to(device)
        matcher = criterion.assigners["queries"]
        found.append(Contender(name, PublishedMatcher(matcher) if name == PUBLISHED else matcher, criterion))
    return found


def timed(
    region: Callable[[], Any], device: torch.device, clock: Callable[[], float] = perf_counter
) -> tuple[Any, float, float | None]:
    """Return the result of `region`, its time with a wait at its end, and on a GPU the time between events, in ms.

    The device must be idle.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    begin = clock()
    for event in events[:1]:
        event.record()
    result = region()
    for event in events[1:]:
        event.record()
    waiter(device)()
    ms = 1000 * (clock() - begin)
    return result, ms, events[0].elapsed_time(events[1]) if events else None


def measure_regions(
    own: Sequence[Contender], inputs: Inputs, device: torch.device, *, repeats: int, warmup: int, clock: str = "wall"
) -> Samples:
    """Return the milliseconds of every repetition by matcher and region; the matchers take turns."""
    samples: Samples = {contender.name: defaultdict(list) for contender in own}
    for repetition in range(-warmup, repeats):
        for contender in own:
            contender.start_anew(inputs)
            waiter(device)()
            assignment, match, match_cuda = timed(partial(contender.match, inputs), device, CLOCKS[clock])
            backward = partial(contender.backward, inputs, assignment)
            _, loss, loss_cuda = timed(backward, device, CLOCKS[clock])
            del assignment, backward  # or their graph would live on while the next one is timed
            for region, ms in zip(REGIONS, (match, loss, match_cuda, loss_cuda)):
                if repetition >= 0 and ms is not None:
                    samples[contender.name][region].append(ms)
    return samples


def compare(args: Namespace, inputs: Inputs) -> dict[str, Any]:
    """Match in both ways; return how many pairs are the same, what the pairs cost, and whether that is the same."""
    published, ours = contenders(args, [PUBLISHED, OURS], inputs.targets[0].boxes.device)
    flat = FlatTargets.of(inputs.targets)
    with torch.no_grad():
        costs = ours.matcher.costs(inputs.predictions, flat)
    pairs, totals = [], []
    for contender in (ours, published):
        found = contender.match(inputs)
        totals.append(
            costs[flat.starts[found.image] + found.target, found.layer, found.slot].cpu().double().sum().item()
        )
        pairs.append(set(zip(*(x.tolist() for x in (found.layer, found.image, found.slot, found.target)))))
    difference = abs(totals[0] - totals[1]) / max(len(pairs[0]), 1)
    return {
        "pairs": [len(found) for found in pairs],
        "common pairs": len(pairs[0] & pairs[1]),
        "cost": totals,
        "difference": difference,
        "same": len(pairs[0]) == len(pairs[1]) and difference < SAME,  # NaN agrees with nothing
    }
