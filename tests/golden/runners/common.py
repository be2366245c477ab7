"""What the runners share: flags to arguments, targets, and comparisons that say where they fail."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from main import get_args_parser
from tests.golden.case import difference
from util.structures import Target

# Defaults of a family where they differ from the parser's (which has Deformable-DETR's).
FAMILY_DEFAULTS = {"Deformable-DETR": {}, "H-Deformable-DETR": {"dim_feedforward": 2048}}


def parse_flags(flags: dict, family: str = "Deformable-DETR", **more) -> Namespace:
    """Return the arguments that the command line `flags` would give, without any download of weights."""
    argv = []
    for name, value in {**FAMILY_DEFAULTS[family], "backbone_weights": "none", **flags, **more}.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is False:
            argv.append(f"--no-{name}")
        elif isinstance(value, (list, tuple)):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return get_args_parser().parse_args(argv)


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
