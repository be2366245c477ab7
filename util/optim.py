"""Optimiser, learning rates over time, frozen parts and the average of the weights.

Groups and schedule are those of Deformable DETR (section 5, "Implementation details").
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from util.errors import UserError


def freeze(model: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Switch the gradient off for every parameter whose name begins with one of `prefixes`; return the names.

    A prefix ends at a dot: `backbone` means `backbone.*`, not `backbone_norm.*`.

    Raises:
        UserError: a prefix that no parameter has.
    """
    frozen = []
    for prefix in prefixes:
        stem = prefix.rstrip(".")
        found = [n for n, _ in model.named_parameters() if n == stem or n.startswith(stem + ".")]
        if not found:
            names = sorted({n.split(".")[0] for n, _ in model.named_parameters()})
            raise UserError(f"--freeze {prefix}: no parameter begins with it; the parts here are {', '.join(names)}")
        frozen += found
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return sorted(set(frozen))


def lr_scale_factor(rule: str, effective_batch: int, recipe_batch: int) -> float:
    """Return what `--lr_scale` multiplies all rates by: 1, or the (square root of the) ratio of the batches."""
    ratio = effective_batch / recipe_batch
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[rule]


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    lr_backbone: float,
    lr_linear_proj_mult: float,
    backbone_names: Sequence[str],
    linear_proj_names: Sequence[str],
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into three groups: the rest, the backbone, the linear projections.

    A parameter belongs to a group if one of the given strings is a part of its name; the backbone is asked first. The
    order of groups and parameters is that of published files, whose optimiser state goes by position. A group may be
    empty.
    """
    rest, backbone, projections = [], [], []
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if any(part in name for part in backbone_names):
            backbone.append(parameter)
        elif any(part in name for part in linear_proj_names):
            projections.append(parameter)
        else:
            rest.append(parameter)
    return [
        {"params": rest, "lr": lr},
        {"params": backbone, "lr": lr_backbone},
        {"params": projections, "lr": lr * lr_linear_proj_mult},
    ]


def build_optimizer(args, model: nn.Module, criterion: nn.Module, lr_factor: float = 1.0) -> torch.optim.Optimizer:
    """Return AdamW, or SGD with momentum 0.9, over the parameters of detector and criterion.

    Args:
        args: the command line.
        model: the detector.
        criterion: its parameters, if it has any (learned matchers), are named `criterion.*`.
        lr_factor: factor on all rates.
    """
    if args.lr_backbone <= 0:  # as in the family: nothing to train there, and no moments to keep
        for name, parameter in model.named_parameters():
            if any(part in name for part in args.lr_backbone_names):
                parameter.requires_grad_(False)
    named = list(model.named_parameters()) + [(f"criterion.{n}", p) for n, p in criterion.named_parameters()]
    groups = parameter_groups(
        named,
        lr=args.lr * lr_factor,
        lr_backbone=args.lr_backbone * lr_factor,
        lr_linear_proj_mult=args.lr_linear_proj_mult,
        backbone_names=args.lr_backbone_names,
        linear_proj_names=args.lr_linear_proj_names,
    )
    trained = [p for group in groups for p in group["params"]]
    if not trained:
        raise UserError("nothing is left to train: --freeze names every part of the model")
    if args.sgd:
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    # One fused kernel on a GPU. On the CPU the plain loop, whose result does not depend on how tensors are batched.
    fused = all(p.is_cuda for p in trained)
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=fused or None)


class StepSchedule:
    """Rates over time: times 0.1 at every drop, and a linear warm-up over the first optimiser steps.

    The rate is computed in closed form from two counters, so a resumed run may change the base rates and the drops:
    what counts is the command line, not what the file was trained with.

    Args:
        optimizer: the current rates of its groups become the base rates.
        drops: number of finished epochs after which the rates drop, ascending.
        warmup_steps: the first step has 1 / warmup_steps of the rate, step `warmup_steps` all of it; 0: none.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, drops: Sequence[int], warmup_steps: int = 0) -> None:
        self.optimizer = optimizer
        self.drops = sorted(drops)
        self.warmup_steps = warmup_steps
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.epochs_done = 0
        self.steps_done = 0
        self.apply()

    def apply(self) -> None:
        """Write the rates of this moment into the optimiser."""
        warmup = min(1.0, (self.steps_done + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        factor = 0.1 ** bisect_right(self.drops, self.epochs_done) * warmup
        for group, base in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = base * factor

    def after_step(self) -> None:
        """Count one optimiser step."""
        self.steps_done += 1
        self.apply()

    def after_epoch(self) -> None:
        """Count one epoch."""
        self.epochs_done += 1
        self.apply()

    def state_dict(self) -> dict[str, Any]:
        """Return the counters; `last_epoch` is the family's word for the finished epochs."""
        return {"last_epoch": self.epochs_done, "steps_done": self.steps_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counters of `state`; a published file has no count of steps, which is past any warm-up."""
        self.epochs_done = int(state["last_epoch"])
        self.steps_done = int(state.get("steps_done", self.warmup_steps))
        self.apply()


def drop_epochs(lr_drop: int, lr_drop_epochs: Sequence[int] | None, epochs: int) -> list[int]:
    """Return the numbers of finished epochs at which rates drop: the given ones, else the multiples of `lr_drop`."""
    return sorted(lr_drop_epochs) if lr_drop_epochs else list(range(lr_drop, epochs + 1, lr_drop))


class ModelEma:
    """Exponential moving average of all weights and buffers of a model.

    Walks over `parameters()` and `buffers()`, which name a shared tensor once (a state dict names it several times, and
    would average it several times). The decay warms up as (1 + n) / (10 + n), or a short run would evaluate its start.

    Args:
        model: copied; the average starts at its weights.
        decay: share of the old average kept per optimiser step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.reset(model)

    def reset(self, model: nn.Module) -> None:
        """Start the average anew at the weights of `model`."""
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0
        self._uncounted: Tensor | None = None  # further updates, counted on the device

    @torch.no_grad()
    def update(self, model: nn.Module, keep: bool | Tensor = True) -> None:
        """Move the average towards the weights of `model`.

        Args:
            keep: a boolean scalar on the device: only if it is true there, and without waiting for it.
        """
        ours, theirs = _tensors(self.module), _tensors(model)
        floats = [(a, b.to(a.dtype)) for a, b in zip(ours, theirs) if a.is_floating_point()]
        averages, weights = [a for a, _ in floats], [b for _, b in floats]
        if isinstance(keep, Tensor):
            share = self._share_on_device(keep)
            steps = torch._foreach_sub(weights, averages)
            torch._foreach_mul_(steps, share)
            torch._foreach_add_(averages, steps)
        else:
            self.updates += 1
            if floats:
                torch._foreach_lerp_(averages, weights, 1 - self._decay_after(self.updates))
        for a, b in zip(ours, theirs):
            if not a.is_floating_point():
                a.copy_(torch.where(keep, b, a) if isinstance(keep, Tensor) else b)

    def _decay_after(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates))

    def _share_on_device(self, keep: Tensor) -> Tensor:
        """Count an update if `keep` and return the share of the new weights, 0 if it is none."""
        if self._uncounted is None:
            self._uncounted = torch.zeros((), dtype=torch.float64, device=keep.device)
        self._uncounted = self._uncounted + keep
        updates = self._uncounted + self.updates
        decay = ((1 + updates) / (10 + updates)).clamp(max=self.decay)
        return torch.where(keep, 1 - decay, 0.0).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        if self._uncounted is not None:
            self.updates, self._uncounted = self.updates + round(self._uncounted.item()), None
        return {"model": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an average."""
        self.module.load_state_dict(state["model"])
        self.updates, self._uncounted = int(state["updates"]), None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()] + list(model.buffers())
