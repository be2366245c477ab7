"""What the runners share: flags to arguments, targets, and comparisons that say where they fail."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from main import get_args_parser
from tests.golden.case import difference
from util.structures import Target

# Defaults of a family where they differ from the parser's (which has Deformable-DETR's).
FAMILY_DEFAULTS = {"Deformable-DETR": {}, "H-Deformable-DETR": {"dim_feedforward": 2048}}


# Published flags without an effect on a detector: segmentation, logging, and options that were never read.
WITHOUT_EFFECT = {"masks", "mask_loss_coef", "dice_loss_coef", "use_wandb", "remove_difficult"}


def parse_flags(flags: dict, family: str = "Deformable-DETR", **more) -> Namespace:
    """Return the arguments that the command line `flags` would give, without any download of weights."""
    parser, argv = get_args_parser(), []
    for name, value in {**FAMILY_DEFAULTS[family], **flags, "backbone_weights": "none", **more}.items():
        argv += _words(parser, name, value)
    return parser.parse_args(argv)


def _words(parser: ArgumentParser, name: str, value: object) -> list[str]:
    """Return the words of the command line that give the flag `name` its value; unknown flags make parsing fail."""
    if value is None or (name in WITHOUT_EFFECT and value is not True):
        return []
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(str, value)]
    if not isinstance(value, bool):
        return [f"--{name}", str(value)]
    options = parser._option_string_actions  # there is no public way to ask which switches have a --no- form
    if f"--{name}" not in options:  # the name of a setting whose switch says the opposite: aux_loss, no_aux_loss
        return [] if parser.get_default(name) is value else [f"--no_{name}"]
    if value:
        return [f"--{name}"]
    return [f"--no-{name}"] if f"--no-{name}" in options else []  # a plain switch is off where it is not given


def make_target(labels: np.ndarray, boxes: np.ndarray, orig_size: Sequence[int] = (1, 1), image_id: int = 0) -> Target:
    """Return a target from stored arrays."""
    return Target(
        labels=torch.from_numpy(np.asarray(labels)).long().reshape(-1),
        boxes=torch.from_numpy(np.asarray(boxes)).float().reshape(-1, 4),
        image_id=image_id,
        orig_size=(int(orig_size[0]), int(orig_size[1])),
    )


def subcases(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the arrays by sub-case: `name/key` becomes `[name][key]`."""
    result: dict[str, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        name, rest = key.split("/", 1)
        result.setdefault(name, {})[rest] = value
    return result


def assert_close(name: str, ours: Tensor | np.ndarray, stored: np.ndarray, tolerance: float) -> None:
    """Assert that the largest absolute difference is at most `tolerance`."""
    found = difference(ours, stored)
    assert found <= tolerance, f"{name}: differs by {found:.3g}, allowed {tolerance:.3g}"


def assert_relative(name: str, ours: Tensor | float, stored: np.ndarray | float, tolerance: float) -> None:
    """Assert a relative difference of at most `tolerance` (with 1e-6 absolute for numbers that are zero)."""
    ours = ours.item() if isinstance(ours, Tensor) else float(ours)
    stored = float(stored)
    found = abs(ours - stored)
    assert found <= tolerance * abs(stored) + 1e-6, f"{name}: {ours:.8g}, stored {stored:.8g}, allowed {tolerance:.1g}"


def assert_tied(name: str, cost: np.ndarray, ours: Sequence[np.ndarray], stored: np.ndarray) -> None:
    """Assert that two different matchings (2, P) of one image are equally good under `cost` (queries, targets).

    Targets count modulo the columns of `cost`: a repeated target has several numbers in the one-to-many branch.
    """
    sums = []
    for slots, matched in (ours, stored):
        assert len(slots) == len(ours[0]), f"{name}: {len(ours[0])} pairs, stored {len(slots)}"
        sums.append(cost[slots, np.asarray(matched) % max(cost.shape[1], 1)].astype(np.float64).sum())
    assert abs(sums[0] - sums[1]) < 1e-5, f"{name}: other pairs, at cost {sums[0]:.6f} instead of {sums[1]:.6f}"
