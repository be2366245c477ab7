"""Freshly built models: optimiser groups, frozen parameters, names in order, initial values."""

from __future__ import annotations

import ast

import numpy as np
import torch

from models import build_model
from tests.golden.runners.common import parse_flags
from util.optim import build_optimizer


def run(meta: dict, arrays: dict[str, np.ndarray]) -> None:
    for name, variant in meta["variants"].items():
        family = "H-Deformable-DETR" if name.startswith("hdetr") else "Deformable-DETR"
        _variant(name, variant, family)


def _variant(name: str, variant: dict, family: str) -> None:
    args = parse_flags(variant["flags"], family)
    torch.manual_seed(0)
    model, criterion, _ = build_model(args)
    names = {id(p): n for n, p in model.named_parameters()}
    groups = build_optimizer(args, model, criterion).param_groups
    for group, kind in zip(groups, ("others", "backbone", "linear_proj"), strict=True):
        where = f"{name}, group {kind}"
        assert len(group["params"]) == variant["trainable_tensors"][kind], where
        assert sum(p.numel() for p in group["params"]) == variant["trainable_elements"][kind], where
        assert abs(group["lr"] - variant["learning_rates"][kind]) < 1e-12, where
    linear = [names[id(p)] for p in groups[2]["params"]]
    assert linear == variant["linear_proj_names"], name
    first = [names[id(p)] for p in groups[0]["params"]]
    assert first[: len(variant["first_names_in_order"])] == variant["first_names_in_order"], name
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == variant["frozen_tensors"], name
    assert set(variant["frozen_examples"]) <= set(frozen), name
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == variant["trainable_total"], name
    parameters = dict(model.named_parameters())
    for key, want in variant["initial_values"].items():
        _initial(f"{name} {key}", parameters[key].detach(), want)


def _initial(name: str, value: torch.Tensor, want: dict) -> None:
    """Compare an initial value: exactly, or as a draw from the same distribution."""
    assert list(value.shape) == want["shape"], name
    if "constant" in want:
        assert (value - want["constant"]).abs().max() < 1e-4, f"{name}: not constantly {want['constant']}"
    elif "values" in want:
        _exact(name, value, want["values"])
    else:
        count = value.numel()
        spread = 5 * want["std"] / count**0.5  # five standard errors, generous for both draws
        assert abs(value.std().item() - want["std"]) < spread + 0.02 * want["std"], f"{name}: std {value.std():.5f}"
        bound = max(abs(want["min"]), abs(want["max"]))
        normal = bound > 2 * want["std"]  # a uniform draw ends at sqrt(3) standard deviations
        assert value.abs().max() < bound * (1.6 if normal else 1.05), f"{name}: range {value.min()} .. {value.max()}"
        assert value.abs().max() > bound * (0.5 if normal else 0.85), f"{name}: range {value.min()} .. {value.max()}"
        shift = abs(value.min().item() + value.max().item() - want["min"] - want["max"]) / 2
        assert shift < 0.2 * (want["max"] - want["min"]), f"{name}: range {value.min()} .. {value.max()}"


def _exact(name: str, value: torch.Tensor, want: str | list) -> None:
    """Compare numbers; a text holds the first ones in brackets."""
    numbers = ast.literal_eval(want[want.index("[") :]) if isinstance(want, str) else want
    found = value.flatten()[: len(numbers)]
    assert (found - torch.tensor(numbers)).abs().max() < 1e-4, f"{name}: {found.tolist()} instead of {numbers}"
