"""Random predictions with embeddings, and matchers built from flags."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from models import build_criterion
from models.assign import Request, SoftMatcher
from models.assign.soft import Found
from models.criterion import Criterion
from tests.tiny import make_target, tiny_args
from util.structures import DetectorOutput, FlatTargets, Predictions, SupervisedSet, Supervision, Target

WIDTH, CLASSES = 32, 4  # of `tiny_args`


def soft_criterion(flags: str = "", matcher: str = "soft") -> Criterion:
    """Return the criterion that training would have."""
    torch.manual_seed(0)
    return build_criterion(tiny_args(f"--matcher {matcher} {flags}"))


def soft_matcher(flags: str = "", matcher: str = "soft") -> SoftMatcher:
    return soft_criterion(flags, matcher).assigners["queries"]


def random_predictions(
    layers: int = 2, images: int = 2, slots: int = 12, *, seed: int = 1, grad: bool = False
) -> Predictions:
    """Return predictions of `layers` layers; with `grad` their three tensors want gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, images, slots, CLASSES, generator=generator)
    boxes = torch.rand(layers, images, slots, 4, generator=generator) * 0.4 + 0.2
    embeds = [torch.randn(images, slots, WIDTH, generator=generator) for _ in range(layers)]
    if grad:
        for leaf in (logits, boxes, *embeds):
            leaf.requires_grad_()
    return Predictions(logits, boxes, embeds=embeds)


def random_target(count: int, *, seed: int = 2) -> Target:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.3
    return make_target(boxes.tolist(), torch.randint(CLASSES, (count,), generator=generator).tolist())


def request_of(predictions: Predictions, targets: list[Target], time: float | None = None, **supervision) -> Request:
    return Request("one2one", predictions, FlatTargets.of(targets), Supervision(**supervision), time=time)


def found_by(matcher: SoftMatcher, request: Request) -> Found:
    """Return everything that `matcher` makes of a request."""
    found = matcher.correspond(request)
    matcher.choose(found)
    return found


def output_of(predictions: Predictions, **supervision) -> DetectorOutput:
    return DetectorOutput({"one2one": SupervisedSet(predictions, (Supervision(**supervision),))})


def dense(pairs, predictions: Predictions, targets: int) -> Tensor:
    """Return the weights of flat pairs as (L, B, M, N)."""
    layers, images, slots, _ = predictions.logits.shape
    found = torch.zeros(layers, images, targets, slots)
    return found.index_put((pairs.layer, pairs.image, pairs.target, pairs.slot), pairs.weight.detach(), accumulate=True)


def permuted(predictions: Predictions, order: Tensor) -> Predictions:
    """Return the predictions with their slots in another order."""
    return replace(
        predictions,
        logits=predictions.logits[:, :, order],
        boxes=predictions.boxes[:, :, order],
        embeds=[x[:, order] for x in predictions.embeds],
    )
