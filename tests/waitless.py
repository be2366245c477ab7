"""Training schemes whose steps never make the host wait for a GPU.

Two things do, once per step each: the NMS of the head `faster_rcnn`, and the number of decoder queries that are made of
the positives of auxiliary heads (`--lambda1` above 0).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny import TWO_STAGE, tiny_images, tiny_targets
from util.engine import StepSettings, TrainStep, train_one_epoch
from util.logger import Meters
from util.nonfinite import NonFiniteGuard
from util.optim import ModelEma, StepSchedule
from util.train_state import TrainState

_REFINED = f"{TWO_STAGE} --mixed_selection --look_forward_twice"
FLAGS = (
    "",
    "--no_aux_loss --num_feature_levels 1",
    f"{_REFINED} --num_queries_one2many 6 --k_one2many 2 --one2many_proposals own",
    f"{_REFINED} --num_queries_one2many 6 --k_one2many 2 --one2many_groups isolated --one2many_own heads",
    "--hybrid epoch --hybrid_k 2",
    "--hybrid layer --hybrid_k 2 --hybrid_layers 1",
    f"{_REFINED} --query_pos box --dn_number 100",
    f"{_REFINED} --query_pos box --dn_number 100 --no_aux_loss",
    "--lambda1 0 --aux_heads atss retinanet",
    "--lambda1 0 --aux_heads fcos gfl paa",
    "--matcher cost-greedy",
    "--matcher soft-literal",
    "--matcher soft --scg rounds --soft_extra_layers 1 --cls_target hard",
    "--matcher soft --soft_warmup teacher",
    f"{TWO_STAGE} --matcher soft --enc_matcher soft --probe_per_layer --layer_consistency last",
)


def ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what asks the device now and then: lines of the progress and the end of an epoch."""
    monkeypatch.setattr(Meters, "flush", lambda self: None)
    monkeypatch.setattr(NonFiniteGuard, "finish", lambda self: None)


def new_state(model: nn.Module, criterion: nn.Module, device: torch.device) -> TrainState:
    """Return the state of a training that leaves out bad steps on the device."""
    model, criterion = model.to(device), criterion.to(device)
    parameters = [p for module in (model, criterion) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    schedule, scaler = StepSchedule(optimizer, []), torch.amp.GradScaler(device.type, enabled=False)
    return TrainState(model, criterion, optimizer, schedule, scaler, ModelEma(model, 0.9), {}, ["a"], [1])


def take_steps(state: TrainState, device: torch.device, settings: StepSettings | None = None, steps: int = 2) -> None:
    """Train an epoch of a few batches: forward, losses, backward, clipping, weights, their average, meters."""
    batches = [(tiny_images(), tiny_targets())] * steps
    guard = NonFiniteGuard(None, 9, deferred=True)
    state.step = 0
    train_one_epoch(TrainStep(state.model, state.criterion), batches, state, settings or StepSettings(), guard, device)
