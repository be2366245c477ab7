"""Assigners by name: from the predictions of all sets of a step to matched pairs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

from models.assign.hungarian import HungarianMatcher, Request
from util.structures import Assignment

# One call per step with every set that names this assigner, so that one copy to the host serves them all.
Assigner = Callable[[Sequence[Request]], list[Assignment]]

__all__ = ["Assigner", "HungarianMatcher", "Request", "build_assigners"]


def build_assigners(args: Namespace) -> dict[str, Assigner]:
    """Return the assigners that supervisions may name."""
    hungarian = HungarianMatcher(
        cost_class=args.set_cost_class, cost_bbox=args.set_cost_bbox, cost_giou=args.set_cost_giou
    )
    return {"hungarian": hungarian}
