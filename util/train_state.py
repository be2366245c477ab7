"""Everything that a run has to remember: what a checkpoint holds and how training continues from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util import dist
from util.checkpoint import load_criterion, load_weights, stored_args, write_atomically
from util.errors import UserError
from util.logger import Meters
from util.optim import ModelEma, StepSchedule
from util.rng import rng_state, set_rng_state
from util.told_flags import ON_RESUME, changes

FORMAT = 1  # of our files; published ones have none


@dataclass
class TrainState:
    """The parts of a run that change while it trains.

    A file is either of the end of an epoch (`step` 0) or of the middle of the epoch `epoch + 1` (`step` batches done).
    """

    model: nn.Module  # without DDP around it
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: StepSchedule
    scaler: torch.amp.GradScaler
    ema: ModelEma | None
    args: dict[str, Any]  # JSON-able
    class_names: list[str]
    category_ids: list[int]
    epoch: int = -1  # last finished epoch, counted from 0
    step: int = 0  # batches done in the epoch after it
    best: dict[str, Any] | None = None  # {"ap", "epoch", "weights": "model" or "ema"}
    train_stats: dict[str, float] = field(default_factory=dict)  # log values of the last finished epoch
    meters: Meters = field(default_factory=Meters)  # of the epoch that is being trained

    def start_at(self, epoch: int) -> None:
        """Make `epoch` the first one to train."""
        self.epoch = epoch - 1
        self.schedule.load_state_dict({"last_epoch": epoch, "steps_done": 0})

    def finish_epoch(self, stats: dict[str, float]) -> None:
        """Count the epoch that has just been trained; `stats` are its log values."""
        self.epoch, self.step = self.epoch + 1, 0
        self.train_stats, self.meters = stats, Meters()
        self.schedule.after_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain Python; a collective, because every process has its own random numbers."""
        per_rank = dist.gather_objects({"rng": rng_state(), "meters": self.meters.state_dict()})
        content = {
            "format": FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.schedule.state_dict(),
            "epoch": self.epoch,
            "args": self.args,
            "rng": [entry["rng"] for entry in per_rank],
            "meters": [entry["meters"] for entry in per_rank],
            "best": self.best,
            "train_stats": self.train_stats,
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
        }
        if self.step:
            content["step"] = self.step
        if self.scaler.is_enabled():
            content["scaler"] = self.scaler.state_dict()
        if self.ema is not None:
            content["ema"] = self.ema.state_dict()
        if self.criterion.state_dict():
            content["criterion"] = self.criterion.state_dict()
        return content

    def save(self, *paths: Path) -> None:
        """Write the same file to every one of `paths`; every process has to call it."""
        content = self.state_dict()
        if dist.is_main():
            for path in paths:
                write_atomically(content, path)

    def save_weights(self, path: Path) -> None:
        """Write the better weights of the last evaluation, without optimiser and other state of the training."""
        averaged = self.best is not None and self.best["weights"] == "ema"
        content = {
            "format": FORMAT,
            "model": (self.ema.module if averaged else self.model).state_dict(),
            "epoch": self.epoch,
            "args": self.args,
            "best": self.best,
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
        }
        if dist.is_main():
            write_atomically(content, path)

    def resume(self, content: Mapping[str, Any], name: str, start_epoch: int = 0) -> None:
        """Continue from a checkpoint: ours exactly, a published one as far as it goes.

        Rates and their drops come from the command line and are recomputed in closed form (the published rule). Other
        settings of the optimiser come from the command line for our files and from the file for published ones.

        Args:
            content: of the file.
            name: of the file, for messages.
            start_epoch: where to start if the file has only weights.

        Raises:
            UserError: the file is of another model or of another optimiser.
        """
        for line in load_weights(self.model, content, name=name).lines:
            dist.info(f"{name}: {line}")
        if self.ema is not None:
            self._resume_ema(content, name)
        if not load_criterion(self.criterion, content, name):
            dist.info(f"{name} holds no learned matcher: it starts anew")
        # Files made smaller for publication may keep the names of the parts they lost.
        parts = (("optimizer", "param_groups"), ("lr_scheduler", "last_epoch"))
        if "epoch" not in content or not all(key in (content.get(part) or ()) for part, key in parts):
            dist.info(f"{name} holds weights only: training starts at epoch {start_epoch} with a fresh optimiser")
            self.start_at(start_epoch)
            return
        own_file = "format" in content
        self._resume_optimizer(content["optimizer"], name, keep_settings=own_file)
        self.schedule.load_state_dict(content["lr_scheduler"])
        if self.scaler.is_enabled() and "scaler" in content:
            self.scaler.load_state_dict(content["scaler"])
        self.epoch, self.step = int(content["epoch"]), int(content.get("step", 0))
        self.best, self.train_stats = content.get("best"), dict(content.get("train_stats") or {})
        self._tell_changes(stored_args(content), name)
        if own_file:
            self._resume_process(content, name)

    def _resume_ema(self, content: Mapping[str, Any], name: str) -> None:
        if isinstance(content.get("ema"), Mapping) and "updates" in content["ema"]:
            self.ema.load_state_dict(content["ema"])
        else:
            dist.info(f"{name} holds no averaged weights: the average starts at its weights")
            self.ema.reset(self.model)

    def _resume_optimizer(self, saved: Mapping[str, Any], name: str, *, keep_settings: bool) -> None:
        groups = self.optimizer.param_groups
        ours, theirs = (["SGD" if "momentum" in g else "AdamW" for g in gs] for gs in (groups, saved["param_groups"]))
        sizes = [[len(g["params"]) for g in gs] for gs in (groups, saved["param_groups"])]
        if ours != theirs or sizes[0] != sizes[1]:
            raise UserError(
                f"the optimiser in {name} does not fit: {theirs[0]} with groups of {sizes[1]} parameters in the file, "
                f"{ours[0]} with {sizes[0]} here. Use the same --aux_heads, --lambda1, --one2many_own, --matcher, "
                "--sgd, --freeze, --lr_backbone, --lr_backbone_names and --lr_linear_proj_names as in training, or "
                "start anew from the weights with --init_from"
            )
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        # Fused kernels want the counts of steps on the device, where loading puts them if it reads that they are fused.
        saved_groups = [{**g, "fused": own.get("fused")} for g, own in zip(saved["param_groups"], settings)]
        self.optimizer.load_state_dict({**saved, "param_groups": saved_groups})
        for group, own in zip(self.optimizer.param_groups, settings):
            kept = own if keep_settings else {k: own[k] for k in ("lr", "fused", "foreach") if k in own}
            group.update(kept)
        for parameter, moments in self.optimizer.state.items():
            odd = [m.shape for m in moments.values() if torch.is_tensor(m) and m.ndim and m.shape != parameter.shape]
            if odd:
                raise UserError(
                    f"the optimiser in {name} is of another model: a moment has shape {list(odd[0])}, its parameter "
                    f"{list(parameter.shape)}; start anew from the weights with --init_from"
                )

    def _tell_changes(self, stored: Mapping[str, Any], name: str) -> None:
        for flag, old, new in changes(stored, self.args, ON_RESUME):
            dist.info(f"--{flag} was {old} in {name}; from here on it is {new}")

    def _resume_process(self, content: Mapping[str, Any], name: str) -> None:
        """Restore what belongs to this process; only the same number of processes has one for each."""
        stored = stored_args(content)
        world = len(content["rng"])
        if world != dist.world_size():
            dist.info(
                f"{name} was written by {world} processes, this run has {dist.world_size()}: it continues, "
                "but with other random numbers"
            )
        else:
            self.meters.load_state_dict(content["meters"][dist.rank()])
            set_rng_state(content["rng"][dist.rank()])
        same_batches = world == dist.world_size() and stored.get("batch_size") == self.args.get("batch_size")
        if self.step and not (same_batches and self.step % self.args["grad_accum_steps"] == 0):
            dist.info(f"the batches are not those of {name}: epoch {self.epoch + 1} starts again at its first batch")
            self.step = 0
            self.meters = Meters()
