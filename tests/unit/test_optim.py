"""Parameter groups, learning rates over time, frozen parts, averaged weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from models import build_model
from tests.tiny import tiny_args
from util.args import get_args_parser
from util.errors import UserError
from util.optim import (
    ModelEma,
    StepSchedule,
    build_optimizer,
    drop_epochs,
    freeze,
    lr_scale_factor,
    parameter_groups,
)

CONSTRUCTION = json.loads((Path(__file__).parents[1] / "golden/cases/construction.json").read_text())["variants"]


def groups_of(names: list[str]) -> list[dict]:
    return parameter_groups(
        [(name, nn.Parameter(torch.zeros(1))) for name in names],
        lr=2e-4,
        lr_backbone=2e-5,
        lr_linear_proj_mult=0.1,
        backbone_names=["backbone.0"],
        linear_proj_names=["reference_points", "sampling_offsets"],
    )


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def test_groups_are_the_rest_then_the_backbone_then_the_linear_projections():
    names = ["backbone.0.body.conv1.weight", "a.sampling_offsets.bias", "class_embed.0.bias", "backbone.1.row.weight"]
    rest, backbone, projections = groups_of(names)
    assert [len(g["params"]) for g in (rest, backbone, projections)] == [2, 1, 1]
    assert [g["lr"] for g in (rest, backbone, projections)] == pytest.approx([2e-4, 2e-5, 2e-5])


@pytest.mark.parametrize("variant", ["base", "hdetr_swin_tiny"])
def test_groups_of_a_full_model_have_the_published_sizes(variant):
    meta = CONSTRUCTION[variant]
    args = get_args_parser().parse_args(["--backbone_weights", "none", "--num_classes", "91"])
    for flag, value in meta["flags"].items():
        setattr(args, {"num_queries": "num_queries_one2one"}.get(flag, flag), value)
    if variant.startswith("hdetr"):
        args.dim_feedforward = 2048
    model, criterion, _ = build_model(args)
    optimizer = build_optimizer(args, model, criterion)
    wanted = [meta["trainable_tensors"][name] for name in ("others", "backbone", "linear_proj")]
    assert [len(g["params"]) for g in optimizer.param_groups] == wanted
    elements = [sum(p.numel() for p in g["params"]) for g in optimizer.param_groups]
    assert elements == [meta["trainable_elements"][name] for name in ("others", "backbone", "linear_proj")]


def test_a_backbone_rate_of_zero_freezes_the_backbone():
    args = tiny_args("--lr_backbone 0")
    model, criterion, _ = build_model(args)
    optimizer = build_optimizer(args, model, criterion)
    assert len(optimizer.param_groups[1]["params"]) == 0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "backbone.0" in n)


def test_parameters_of_the_criterion_are_trained_too():
    args = tiny_args()
    model, criterion, _ = build_model(args)
    criterion.temperature = nn.Parameter(torch.ones(()))
    optimizer = build_optimizer(args, model, criterion)
    assert any(p is criterion.temperature for p in optimizer.param_groups[0]["params"])


def test_sgd_has_momentum_and_the_same_groups():
    args = tiny_args("--sgd --lr 0.01")
    model, criterion, _ = build_model(args)
    optimizer = build_optimizer(args, model, criterion, lr_factor=0.5)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9] * 3
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.005, 1e-5, 0.0005])


def test_freezing_takes_whole_parts_of_names_and_lists_them():
    model = nn.ModuleDict({"neck": nn.Linear(1, 1), "neck_norm": nn.LayerNorm(1)})
    assert freeze(model, ["neck"]) == ["neck.bias", "neck.weight"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["neck_norm.weight", "neck_norm.bias"]


def test_freezing_something_that_is_not_there_names_what_is():
    with pytest.raises(UserError, match=r"--freeze encoder.*class_embed, input_proj"):
        freeze(nn.ModuleDict({"input_proj": nn.Linear(1, 1), "class_embed": nn.Linear(1, 1)}), ["encoder"])


def test_freezing_everything_is_refused():
    args = tiny_args()
    model, criterion, _ = build_model(args)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is left to train"):
        build_optimizer(args, model, criterion)


def test_rates_drop_after_the_given_epochs():
    optimizer = sgd(lr=2.0)
    schedule = StepSchedule(optimizer, drop_epochs(40, [2, 3], epochs=5))
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.after_epoch()
    assert rates == pytest.approx([2, 2, 0.2, 0.02, 0.02])


def test_lr_drop_repeats():
    assert drop_epochs(40, None, epochs=100) == [40, 80]
    assert drop_epochs(2, [5, 1], epochs=100) == [1, 5]


def test_warm_up_counts_optimiser_steps_and_reaches_the_full_rate():
    optimizer = sgd(lr=8.0)
    schedule = StepSchedule(optimizer, [], warmup_steps=4)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.after_step()
    assert rates == [2, 4, 6, 8, 8, 8]


def test_a_schedule_continues_from_its_state_with_new_rates():
    first = StepSchedule(sgd(), [1], warmup_steps=10)
    for _ in range(4):
        first.after_step()
    first.after_epoch()
    optimizer = sgd(lr=5.0)
    StepSchedule(optimizer, [1], warmup_steps=10).load_state_dict(first.state_dict())
    assert optimizer.param_groups[0]["lr"] == pytest.approx(5.0 * 0.1 * 0.5)


def test_a_published_schedule_is_past_its_warm_up():
    optimizer = sgd()
    StepSchedule(optimizer, [40], 100).load_state_dict({"last_epoch": 41, "step_size": 40, "base_lrs": [1.0]})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 0.5), ("linear", 0.25)])
def test_rates_scale_with_the_effective_batch(rule, factor):
    assert lr_scale_factor(rule, 8, 32) == factor


class Shared(nn.Module):
    """One tensor under two names, a float buffer and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = self.first
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        nn.init.zeros_(self.first.weight)


def test_the_average_moves_shared_weights_once_and_averages_buffers():
    model = Shared()
    ema = ModelEma(model, decay=0.1)  # below the warm-up, so it applies from the first update
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    model.mean.fill_(2.0)
    model.count.fill_(7)
    ema.update(model)
    assert ema.module.first.weight.item() == pytest.approx(0.9)
    assert ema.module.second.weight is ema.module.first.weight
    assert ema.module.mean.item() == pytest.approx(1.8)
    assert ema.module.count.item() == 7


def test_the_average_warms_up():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = ModelEma(model, decay=0.9997)
    nn.init.ones_(model.weight)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(1 - 2 / 11)
    ema.update(model)
    assert ema.module.weight.item() == pytest.approx(1 - 2 / 11 * 3 / 12)


def test_an_average_continues_from_its_state():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    one, other = ModelEma(model, 0.9), ModelEma(nn.Linear(3, 2), 0.9)
    for _ in range(3):
        nn.init.normal_(model.weight)
        one.update(model)
    other.load_state_dict(one.state_dict())
    nn.init.normal_(model.weight)
    one.update(model)
    other.update(model)
    assert torch.equal(one.module.weight, other.module.weight)
    assert math.isfinite(one.module.weight.sum().item())
