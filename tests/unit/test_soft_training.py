"""Matchers in a run: flags, roles, schemes, checkpoints, clipping, several processes."""

from __future__ import annotations

import json

import pytest
import torch

from main import main
from models import build_criterion, build_model
from models.assign import GreedyMatcher, HungarianMatcher, SoftMatcher
from tests.cli import run
from tests.test_distributed import CPU, both, gradients, halves, in_two_processes
from tests.test_distributed import step_of as step_with
from tests.test_end_to_end import FLAGS
from tests.tiny import TWO_STAGE, make_target, tiny_args, tiny_images, tiny_targets
from util.checkpoint import read_checkpoint
from util.engine import StepSettings, TrainStep, distribute, train_one_epoch
from util.errors import UserError
from util.nonfinite import NonFiniteGuard
from util.optim import StepSchedule, build_optimizer
from util.train_state import TrainState


def classes_of(flags: str) -> tuple[type, type]:
    assigners = build_criterion(tiny_args(flags)).assigners
    return type(assigners["queries"]), type(assigners["proposals"])


# flags


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (HungarianMatcher, HungarianMatcher)),
        (f"{TWO_STAGE} --matcher cost-greedy", (GreedyMatcher, GreedyMatcher)),
        (f"{TWO_STAGE} --matcher soft", (SoftMatcher, GreedyMatcher)),
        (f"{TWO_STAGE} --matcher soft-literal --enc_matcher soft", (SoftMatcher, SoftMatcher)),
        (f"{TWO_STAGE} --matcher soft --enc_matcher hungarian", (SoftMatcher, HungarianMatcher)),
        (f"{TWO_STAGE} --enc_matcher soft", (HungarianMatcher, SoftMatcher)),
    ],
)
def test_flags_say_who_matches_queries_and_who_matches_proposals(flags: str, expected: tuple) -> None:
    assert classes_of(flags) == expected


def test_one_matcher_of_both_roles_has_its_parameters_once() -> None:
    criterion = build_criterion(tiny_args(f"{TWO_STAGE} --matcher soft --enc_matcher soft"))
    assert {name.split(".")[:2][1] for name in criterion.state_dict()} == {"queries"}
    assert not build_criterion(tiny_args("--matcher cost-greedy")).state_dict()


def test_the_literal_matcher_is_the_soft_one_with_other_defaults_which_flags_override() -> None:
    literal = build_criterion(tiny_args("--matcher soft-literal")).assigners["queries"]
    options = literal.options
    assert (options.column_competition, options.soft_warmup, options.corr_grad) == ("none", "none", "full")
    assert literal.probe.log_scale is None and not literal.probe.key_box and literal.costs.all_classes
    changed = build_criterion(tiny_args("--matcher soft-literal --soft_norm column --probe_logits cosine --key_box"))
    changed = changed.assigners["queries"]
    assert changed.options.soft_norm == "column" and changed.options.corr_grad == "full"
    assert changed.probe.log_scale is not None and changed.probe.key_box


def test_the_literal_probe_has_a_third_of_a_million_parameters() -> None:
    args = tiny_args("--matcher soft-literal --hidden_dim 256 --num_classes 80")
    assert sum(p.numel() for p in build_criterion(args).parameters()) == pytest.approx(350_000, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scg rounds", "--scg rounds: nothing is learned here; add --matcher soft"),
        ("--matcher cost-greedy --no-soft_background", "--soft_background False: nothing is learned"),
        ("--matcher soft --enc_matcher soft", "--enc_matcher soft is for --two_stage"),
        ("--cls_target weight", "--matcher hungarian makes no weights"),
        ("--greedy_rounds 4", "nobody bids here"),
        ("--matcher soft --greedy_rounds 0", "must be at least 1"),
        ("--matcher soft --scg_rho 1.5", "--scg_rho 1.5: a share, 0 to 1"),
        ("--matcher soft --scg rounds --scg_switch 0.7", "there from the start"),
        ("--matcher soft-literal --logit_scale_max 10", "dot products have no scale"),
        ("--matcher soft --extra_cls positive", "add --cls_target hard"),
        ("--matcher soft-literal --scg rounds --extra_cls positive", "add --cls_target hard"),
        ("--matcher soft --soft_extra_layers 3", "0 to --dec_layers 2"),
        ("--matcher soft --probe_entropy -1", "0 or more"),
        ("--matcher cost-greedy --probe_per_layer", "--probe_per_layer True: nothing is learned here"),
        ("--probe_value prediction", "--probe_value prediction: nothing is learned here"),
        ("--matcher soft --layer_consistency last --no_aux_loss", "the last layer is the only one"),
        ("--matcher soft --layer_consistency last --soft_extra_layers 1", "drop --soft_extra_layers"),
        (f"{TWO_STAGE} --enc_matcher soft --layer_consistency last", "is about decoder layers, which --matcher hung"),
    ],
)
def test_impossible_flags_are_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_args(flags))


# schemes

SCHEMES = {
    "branch": f"--matcher soft {TWO_STAGE} --enc_matcher soft --num_queries_one2many 12 --k_one2many 3",
    "isolated": f"--matcher soft-literal {TWO_STAGE} --one2many_groups isolated "
    "--num_queries_one2many 6 --k_one2many 2",
    "layer": "--matcher soft --hybrid layer --hybrid_k 3 --hybrid_layers 1 --with_box_refine",
    "heads": f"--matcher soft {TWO_STAGE} --aux_heads atss",
    "probes": f"--matcher soft {TWO_STAGE} --enc_matcher soft --probe_per_layer --hybrid layer --hybrid_k 3 "
    "--hybrid_layers 1 --layer_consistency last",
    "probe": "--matcher soft --probe_per_layer --no_aux_loss --probe_value prediction",
    "isolated_probes": f"--matcher soft {TWO_STAGE} --enc_matcher soft --one2many_groups isolated "
    "--num_queries_one2many 6 --k_one2many 2 --probe_per_layer --probe_value prediction --corr_grad full",
    "greedy": f"--matcher cost-greedy {TWO_STAGE} --one2many_proposals own --num_queries_one2many 6 --k_one2many 2",
}


@pytest.mark.parametrize("flags", SCHEMES.values(), ids=SCHEMES.keys())
def test_every_scheme_trains_with_it_and_all_parameters_get_a_gradient(flags: str) -> None:
    model, criterion, _ = build_model(tiny_args(flags))
    for targets in (tiny_targets(), [make_target(), make_target()]):
        for part in (model, criterion):
            part.zero_grad()
        report = criterion(model(tiny_images(), targets), targets, 0.3)
        report.total.backward()
        assert torch.isfinite(report.total)
        named = [*model.named_parameters(), *criterion.named_parameters()]
        assert not [name for name, p in named if p.requires_grad and p.grad is None]
        if "one2many" in flags:
            assert "loss_ce_one2many" in report.terms
            assert ("unassigned_one2many" in report.terms) == any(map(len, targets))  # a 0 would spoil averages


# training


def state_of(flags: str, **progress: int) -> TrainState:
    """Return a run on one process that has come so far."""
    args = tiny_args(f"--matcher soft --num_feature_levels 3 {flags}")
    model, criterion, _ = build_model(args)
    optimizer = build_optimizer(args, model, criterion)
    return TrainState(
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=StepSchedule(optimizer, []),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=None,
        args=vars(args),
        class_names=["a"],
        category_ids=[1],
        **progress,
    )


def test_changed_flags_of_a_matcher_are_told_when_a_run_goes_on(capsys) -> None:
    content = state_of("", epoch=0).state_dict()
    changes = "--scg rounds --greedy_rounds 4 --cls_target quality --corr_loss_coef 0.5"
    state_of(changes).resume(content, "a.pth")
    told = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "from here on it is" in line}
    assert told == {"--scg", "--greedy_rounds", "--cls_target", "--corr_loss_coef"}


def test_the_matcher_is_clipped_on_its_own_and_sees_the_time() -> None:
    torch.manual_seed(0)
    state = state_of("--sgd --weight_decay 0 --lr 1 --lr_backbone 1 --epochs 10", epoch=3, step=1)
    model, criterion = state.model, state.criterion
    before = [p.detach().clone() for p in criterion.parameters()]
    times, forward = [], criterion.forward
    criterion.forward = lambda output, targets, time=None: times.append(time) or forward(output, targets, time)
    clipped = StepSettings(clip_max_norm=1e-3)

    class Loader(list):
        def __len__(self) -> int:
            return 2  # the first batch of this epoch is done

    train_one_epoch(TrainStep(model, criterion), Loader([both()]), state, clipped, NonFiniteGuard(None, 9), CPU)
    moved = torch.stack([(p - q).norm() for p, q in zip(criterion.parameters(), before)]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-2)  # all of the bound, not what the detector leaves of it
    assert times == [4.5]


DATA = "--synthetic_train 4 --synthetic_val 2 --epochs 1"


def test_a_soft_run_is_resumed_and_evaluated_with_and_without_its_matcher(tmp_path, capsys) -> None:
    soft = f"{DATA} --matcher soft --epochs 2"
    assert run(tmp_path / "run", f"{soft} --save_every 1 --soft_warmup_share 1") == 0
    first = tmp_path / "run" / "checkpoint0000.pth"
    assert run(tmp_path / "parts", f"{soft} --soft_warmup_share 1 --resume {first}") == 0
    file = tmp_path / "run" / "checkpoint.pth"
    content = read_checkpoint(file)
    resumed = read_checkpoint(tmp_path / "parts" / "checkpoint.pth")
    assert any("probe" in name for name in content["criterion"])
    assert not any("probe" in name for name in content["model"])
    entry = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert {"train_distinct_unscaled", "train_loss_corr", "test_agree_unscaled", "test_loss_corr"} <= entry.keys()
    for part in ("model", "criterion"):
        for name, value in content[part].items():
            assert torch.equal(value, resumed[part][name]), name

    assert run(tmp_path / "plain", f"{DATA} --eval --resume {file}") == 0
    assert run(tmp_path / "with", f"{DATA} --matcher soft --eval --resume {file}") == 0
    assert "evaluated without losses" not in capsys.readouterr().out
    best = tmp_path / "run" / "checkpoint_best.pth"
    torch.save({key: value for key, value in content.items() if key != "criterion"}, best)
    assert run(tmp_path / "best", f"{DATA} --matcher soft --eval --resume {best}") == 0
    assert "holds no learned matcher: evaluated without losses" in capsys.readouterr().out
    results = [json.loads((tmp_path / n / "eval/results.json").read_text()) for n in ("plain", "with", "best")]
    assert results[0] == results[1] == results[2] and results[0]
    assert run(tmp_path / "other", f"{DATA} --matcher soft-literal --eval --resume {file}") == 2
    assert "was trained with another matcher" in capsys.readouterr().err


def test_eight_images_are_memorised_with_a_query_for_each_object(tmp_path) -> None:
    flags = FLAGS.replace("--no-eval_loss", "--eval_loss").split()
    flags += "--synthetic_train 8 --synthetic_val 8 --epochs 45 --lr_drop 35 --eval_every 45 --save_every 45".split()
    assert main([*flags, "--matcher", "soft", "--eval_in_training_set", "--output_dir", str(tmp_path)]) == 0
    entry = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert entry["test_coco_eval_bbox"][1] > 0.9
    assert entry["test_distinct_unscaled"] == 1 and entry["test_unassigned_unscaled"] == 0
    assert entry["test_agree_unscaled"] > 0.9


TAUGHT = "--matcher soft --probe_per_layer"  # every probe needs a gradient in both processes


def _backward(rank: int, folder: str) -> None:
    step = step_with(TAUGHT)
    images, targets = halves()[rank]
    wrapped = distribute(step, CPU)
    wrapped(images, targets, 0).total.backward()
    torch.save(gradients(step), f"{folder}/{rank}.pth")


def test_two_processes_teach_the_probes_what_one_would(tmp_path) -> None:
    parts = in_two_processes(_backward, tmp_path)
    step = step_with(TAUGHT)
    step(*both(), 0).total.backward()
    for name, expected in gradients(step).items():
        for part in parts:
            torch.testing.assert_close(part[name], expected, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert any("probe" in name and g.abs().sum() > 0 for name, g in gradients(step).items())
