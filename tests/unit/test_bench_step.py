"""The merged losses of the hybrid branch against the plain form (H-DETR, supplement E), and the benchmark of both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY, TWO_STAGE, tiny_args, tiny_images
from util import bench_step
from util.bench_common import timed_step
from util.bench_step import criterion_forms, main, random_targets, whole_forms
from util.structures import Target

BRANCH = "--num_queries_one2many 15 --k_one2many 3 --lambda_one2many 0.5"
CROWD = [5, 0, 1]  # objects of three images; 15 copies of five objects take every one-to-many query


def gradients(form: bench_step.Form) -> tuple[float, list[torch.Tensor]]:
    """Return the total and the gradient of every leaf."""
    for leaf in form.leaves:
        leaf.grad = None
    total = form.loss(form.forward())
    total.backward()
    return total.item(), [torch.zeros_like(x) if x.grad is None else x.grad.clone() for x in form.leaves]


@pytest.mark.parametrize("flags", ["", "--no_aux_loss", "--num_queries_one2many 11", "--set_cost_class 0"])
@pytest.mark.parametrize("counts", [CROWD, [0, 0, 0]], ids=["crowd", "empty"])
def test_merged_and_plain_losses_of_the_branch_have_equal_totals_and_gradients(counts: list[int], flags: str) -> None:
    args = tiny_args(f"{BRANCH} {flags}")
    _, merged, plain = criterion_forms(args, random_targets(counts, classes=4), tokens=20)
    (total, ours), (expected, theirs) = gradients(merged), gradients(plain)
    assert total == pytest.approx(expected, rel=1e-6)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_the_branch_reaches_every_query_that_it_matches_and_nothing_of_the_others() -> None:
    args = tiny_args(BRANCH)
    torch.manual_seed(0)
    _, merged, plain = criterion_forms(args, random_targets(CROWD, classes=4))
    for form in (merged, plain):
        _, (_, boxes) = gradients(form)  # (layers, images, 8 + 15 queries, 4)
        taught = boxes.abs().sum(-1) > 0
        # One-to-one: as many queries as objects. One-to-many: three times as many, at most 15.
        assert taught[:, :, :8].sum(-1).tolist() == [CROWD] * 2
        assert taught[:, :, 8:].sum(-1).tolist() == [[15, 0, 3]] * 2


def test_without_its_branch_the_total_is_the_one_of_the_one_to_one_queries() -> None:
    torch.manual_seed(0)
    targets = random_targets(CROWD, classes=4)
    first, merged, _ = criterion_forms(tiny_args(BRANCH), targets)
    report = {}
    for name, form in (("first", first), ("merged", merged)):
        report[name] = gradients(form)
    assert report["merged"][0] > report["first"][0]
    for own, other in zip(report["merged"][1], report["first"][1], strict=True):
        torch.testing.assert_close(own[:, :, :8], other, rtol=1e-5, atol=1e-7)


def test_merged_and_plain_agree_in_every_parameter_of_a_two_stage_model() -> None:
    args = tiny_args(f"{BRANCH} {TWO_STAGE} --mixed_selection --look_forward_twice")
    torch.manual_seed(1)
    targets = random_targets([4, 0], classes=4)
    _, merged, plain = whole_forms(args, tiny_images(), targets)
    (total, ours), (expected, theirs) = gradients(merged), gradients(plain)
    assert total == pytest.approx(expected, rel=1e-6)
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_steps_of_the_benchmark_do_all_work_but_leave_the_weights() -> None:
    args = tiny_args(BRANCH)
    _, merged, _ = whole_forms(args, tiny_images(), random_targets([2, 1], classes=4))
    before = [leaf.detach().clone() for leaf in merged.leaves]
    timed_step(merged, torch.device("cpu"), parts=True)
    assert all(leaf.grad is not None for leaf in merged.leaves)
    assert all(torch.equal(old, leaf) for old, leaf in zip(before, merged.leaves, strict=True))


SMALL = f"{TINY} {BRANCH} --device cpu --dim_feedforward 48 --repeats 2 --warmup 0 --objects 4 2"


@pytest.mark.parametrize("mode", ["", "--whole --image_size 64 64"], ids=["criterion", "whole"])
def test_the_command_line_prints_a_table_and_writes_every_sample(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "times.json"
    assert main(f"{SMALL} {mode} --output {output}".split()) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ms | T = 0 | merged | plain | plain / merged |") == 2
    assert printed.count("merged and plain agree") == 2
    assert printed.endswith(f"all numbers are in {output}\n")
    results = json.loads(output.read_text())["results"]
    assert [entry["objects"] for entry in results] == [4, 2]
    for entry in results:
        assert entry["same"] and entry["loss difference"] < 1e-5
        for ms in entry["ms"].values():
            assert all(len(samples) == 2 for samples in ms.values())
            for inner, outer in (("solver", "matching"), ("matching", "criterion"), ("criterion", "step")):
                assert all(0 < a < b for a, b in zip(ms[inner], ms[outer]))


@pytest.mark.parametrize("flags", ["--two_stage --mixed_selection", "--no-two_stage --no-mixed_selection"])
def test_flags_of_the_model_win_over_the_defaults_of_the_benchmark(flags: str, capsys: pytest.CaptureFixture) -> None:
    assert main(f"{SMALL} --whole --image_size 64 64 --repeats 1 --objects 1 {flags}".split()) == 0
    assert "there is no --output" in capsys.readouterr().out


def test_a_plain_form_that_forgets_a_copy_is_found(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    whole = bench_step.repeated

    def fewer(target: Target, copies: int) -> Target:
        return whole(target, copies - 1)

    monkeypatch.setattr(bench_step, "repeated", fewer)
    assert main(f"{SMALL} --repeats 1".split()) == 1
    assert "merged and plain DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_queries_one2many 0", "there is no branch to time"),
        ("--one2many_groups isolated", "--one2many_groups isolated: the plain form knows only"),
        ("--hybrid epoch", "--hybrid epoch: the plain form knows only"),
        ("--repeats 0", "--repeats 0: must be at least 1"),
        ("--amp fp16", "use --amp bf16"),
        ("--output nowhere/at/all.json", "there is no folder nowhere"),
        ("--objects 3 -1", "must be at least 0"),
    ],
)
def test_what_cannot_be_timed_is_refused_with_the_way_out(flags: str, message: str, capsys) -> None:
    assert main(f"{SMALL} {flags}".split()) == 2
    assert message in capsys.readouterr().err
