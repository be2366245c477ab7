"""The benchmark of matchers: its baseline, its inputs, its tables and what it claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.assign import Request
from tests.tiny import TINY, tiny_args
from util import bench_match, bench_matchers
from util.bench_match import claim, main, no_claim, savings, table
from util.bench_matchers import MATCHERS, OURS, PUBLISHED, args_of, compare, contenders, make_inputs, published_loss
from util.boxes import cxcywh_to_xyxy, paired_iou
from util.structures import Assignment, DetectorOutput, FlatTargets, SupervisedSet, Supervision

COUNTS = [5, 0, 11]  # objects of three images, the last with more than there are queries


def inputs(counts: list[int] = COUNTS, *, trained: bool = False, queries: int = 8) -> bench_matchers.Inputs:
    torch.manual_seed(3)
    return make_inputs(counts, layers=2, queries=queries, classes=4, width=32, trained=trained)


def pairs(found: Assignment) -> set[tuple[int, ...]]:
    return set(zip(*(x.tolist() for x in (found.layer, found.image, found.slot, found.target))))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "random"])
@pytest.mark.parametrize("flags", ["", "--set_cost_class 0.5 --set_cost_bbox 1 --set_cost_giou 7", "--set_cost_giou 0"])
def test_the_published_form_finds_our_pairs_at_our_cost(flags: str, trained: bool) -> None:
    found = compare(tiny_args(flags), inputs(trained=trained))
    assert found["pairs"] == [2 * (5 + 8)] * 2 and found["common pairs"] == 2 * (5 + 8)
    assert found["cost"][0] == pytest.approx(found["cost"][1], rel=1e-5) and found["same"]


def test_the_published_form_matches_the_part_of_the_predictions_that_it_is_asked_for() -> None:
    given = inputs([2, 3])
    request = Request(
        "part", given.predictions, FlatTargets.of(given.targets), Supervision(), rows=[1], slots=slice(2, 7)
    )
    published, ours = contenders(tiny_args(), [PUBLISHED, OURS])
    (found,), (expected,) = published.matcher([request]), ours.matcher([request])
    assert pairs(found) == pairs(expected) and len(found) == 5
    assert found.count == expected.count == 5


def test_a_published_form_that_pays_more_is_found(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bench_matchers.PublishedMatcher, "_costs", lambda *_: torch.zeros(2, 8, 4))
    assert main(f"{SMALL} --matchers hungarian-published hungarian --queries 8 --objects 2".split()) == 1
    assert f"hungarian and {PUBLISHED} DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(MATCHERS))
def test_the_two_timed_regions_together_do_the_work_of_the_criterion(name: str) -> None:
    given = inputs([2, 3])
    (contender,) = contenders(tiny_args(), [name])
    leaves = [*given.leaves, *contender.criterion.parameters()]
    contender.backward(given, contender.match(given))
    found = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    contender.start_anew(given)
    assert all(leaf.grad is None for leaf in leaves)
    whole = DetectorOutput({"one2one": SupervisedSet(given.predictions, (Supervision(),))})
    contender.criterion(whole, given.targets).total.backward()
    expected = [leaf.grad for leaf in leaves if leaf.grad is not None]
    predictions = 4 if name == "soft-literal" else 2  # the others do not train embeddings
    assert len(found) == predictions + len(list(contender.criterion.parameters()))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_the_published_loss_is_our_total_and_gives_the_matcher_back() -> None:
    given = inputs([2, 3])
    (ours,) = contenders(tiny_args(), [OURS])
    output = DetectorOutput({"one2one": SupervisedSet(given.predictions, (Supervision(),))})
    total = published_loss(ours.criterion, output, given.targets)
    assert total.item() == pytest.approx(ours.criterion(output, given.targets).total.item(), rel=1e-6)
    assert ours.criterion.assigners["queries"] is ours.matcher


def test_trained_predictions_find_every_object_on_every_layer_and_leave_half_of_the_queries_alone() -> None:
    given = inputs([5], trained=True, queries=40)
    boxes, target = given.predictions.boxes.detach(), given.targets[0]
    assert boxes.min() > 0 and boxes.max() < 1
    iou = paired_iou(cxcywh_to_xyxy(boxes[:, 0, None]), cxcywh_to_xyxy(target.boxes[None, :, None]))  # (2, 5, 40)
    own = given.predictions.logits.detach()[:, 0][..., target.labels].mT
    assert ((iou > 0.5) & (own > -2)).any(2).all()
    quiet = given.predictions.logits.detach()[:, 0].amax(-1) < 0
    assert quiet.sum(1).min() >= 20


def test_every_matcher_gets_the_flags_that_it_knows() -> None:
    args = tiny_args(
        "--matcher soft --key_box --scg_rho 0.3 --greedy_rounds 4 --cls_target quality --corr_loss_coef 0.5"
    )
    found = {name: vars(args_of(args, name)) for name in MATCHERS}
    assert [found[name]["matcher"] for name in MATCHERS] == [
        *("hungarian", "hungarian", "cost-greedy", "soft", "soft-literal", "soft")
    ]
    assert found["soft-rounds"]["scg"] == "rounds" and found["soft"]["scg"] is None
    assert [found[name]["scg_rho"] for name in MATCHERS] == [None, None, None, 0.3, 0.3, None]
    assert [found[name]["greedy_rounds"] for name in MATCHERS] == [None, None, 4, None, None, 4]
    assert [found[name]["corr_loss_coef"] for name in MATCHERS] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert {found[name]["cls_target"] for name in MATCHERS} == {"quality"}
    weight = tiny_args("--matcher soft --cls_target weight")
    assert [args_of(weight, name).cls_target for name in (OURS, "soft")] == [None, "weight"]


def test_what_makes_a_matcher_wins_over_the_command_line() -> None:
    found = {name: args_of(tiny_args("--scg rowpeak --scg_switch 0.5"), name) for name in MATCHERS}
    assert [found[name].scg for name in ("soft", "soft-literal", "soft-rounds")] == ["rowpeak", "rowpeak", "rounds"]
    assert [found[name].scg_switch for name in ("soft", "soft-literal", "soft-rounds")] == [0.5, 0.5, None]


def entry(times: dict[str, list[float]], *, objects: int = 5, queries: int = 300, batch: int = 2) -> dict[str, Any]:
    ms = {name: {"match_ms": samples, "loss_ms": [1.0]} for name, samples in times.items()}
    return {"batch": batch, "queries": queries, "objects": objects, "ms": ms}


HAND_MADE = [
    entry({PUBLISHED: [10.0], OURS: [4.0, 5.0, 60.0], "cost-greedy": [8.0], "soft": [2.0]}),
    entry({PUBLISHED: [20.0], OURS: [4.0], "cost-greedy": [5.0], "soft": [8.0]}, objects=20),
    entry({PUBLISHED: [1.0], OURS: [0.0], "cost-greedy": [1.0], "soft": [1.0]}, queries=900),
]


def test_the_table_shows_medians_percentiles_and_the_ratio() -> None:
    assert table(HAND_MADE, "match_ms").splitlines() == [
        "| N | M | hungarian-published | hungarian | cost-greedy | soft | soft / hungarian |",
        "|---|---|---|---|---|---|---|",
        "| 300 | 5 | 10.00 (10.00) | 5.00 (49.00) | 8.00 (8.00) | 2.00 (2.00) | 0.40 |",
        "| 300 | 20 | 20.00 (20.00) | 4.00 (4.00) | 5.00 (5.00) | 8.00 (8.00) | 2.00 |",
        "| 900 | 5 | 1.00 (1.00) | 0.00 (0.00) | 1.00 (1.00) | 1.00 (1.00) | - |",
    ]
    alone = table([entry({OURS: [1.0]})], "match_ms").splitlines()
    assert alone[0] == "| N | M | hungarian |" and alone[2] == "| 300 | 5 | 1.00 (1.00) |"


def test_the_claim_is_about_300_queries_and_6_layers_and_tells_how_far_it_is() -> None:
    assert claim(HAND_MADE, OURS, 6) == (
        "match_ms(soft) < 0.5 x match_ms(hungarian) at N = 300, 6 layers: holds in 1 of 2 cells (batch 2, M = 5: 0.40 "
        "holds; batch 2, M = 20: 2.00 fails, 4.0 times too long)"
    )
    assert "M = 5: 0.20 holds; batch 2, M = 20: 0.40 holds" in claim(HAND_MADE, PUBLISHED, 6)
    assert "not measured (needs --queries 300" in claim(HAND_MADE, OURS, 3)
    assert "not measured" in claim(HAND_MADE[2:], OURS, 6)


def test_savings_are_told_apart_from_having_no_solver() -> None:
    line = savings(HAND_MADE)
    assert "M = 5: hungarian -50 %, cost-greedy -20 %, soft -80 %; batch 2, M = 20: hungarian -80 %" in line
    assert savings([entry({OURS: [1.0], "soft": [1.0]})]) == ""


def test_numbers_of_a_processor_come_with_a_warning_and_those_of_a_gpu_do_not() -> None:
    assert "say nothing about latency on a GPU" in no_claim(torch.device("cpu"))
    assert no_claim(torch.device("cuda")) == ""


SMALL = f"{TINY} --device cpu --repeats 2 --warmup 0"
GRID = "--queries 8 12 --objects 2 9 --batches 1 2"


@pytest.mark.parametrize("flags", ["", "--predictions random --clock cpu"])
def test_the_command_line_prints_tables_and_writes_every_sample(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "times.json"
    assert main(f"{SMALL} {GRID} {flags} --matchers {' '.join(MATCHERS)} --output {output}".split()) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"| N | M | {' | '.join(MATCHERS)} | soft / hungarian |") == 4  # two regions of two batches
    assert f"hungarian and {PUBLISHED} agree: " in printed and "say nothing about latency on a GPU" in printed
    assert printed.endswith(f"all numbers are in {output}\n")
    content = json.loads(output.read_text())
    cells = [(e["batch"], e["queries"], e["objects"]) for e in content["results"]]
    assert cells == [(b, n, m) for b in (1, 2) for n in (8, 12) for m in (2, 9)]
    for result in content["results"]:
        assert result["same"] and list(result["ms"]) == list(MATCHERS)
        for ms in result["ms"].values():
            assert all(len(ms[region]) == 2 and min(ms[region]) > 0 for region in ("match_ms", "loss_ms"))


def test_whole_steps_are_timed_with_every_matcher(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "times.json"
    flags = (
        "--whole --image_size 64 64 --queries 8 --objects 3 --matchers hungarian hungarian-published cost-greedy soft"
    )
    assert main(f"{SMALL} {flags} --output {output}".split()) == 0
    assert "| iter_ms | hungarian | hungarian-published | cost-greedy | soft |" in capsys.readouterr().out
    (result,) = json.loads(output.read_text())["results"]
    for name, ms in result["ms"].items():
        assert all(0 < a < b < c for a, b, c in zip(ms["matching"], ms["criterion"], ms["step"])), name
        assert ("solver" in ms) == name.startswith("hungarian")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--matcher soft", "--matcher soft: several are compared here; give --matchers soft"),
        ("--matchers soft soft", "each only once"),
        ("--queries 0", "--queries [0]: must be at least 1"),
        ("--objects -1", "--objects [-1]: must be at least 0"),
        ("--repeats 0", "--repeats 0: must be at least 1"),
        ("--scg_rho 2", "--scg_rho 2.0: a share"),
        ("--amp bf16", "give it with --whole only"),
        ("--amp fp16 --whole", "use --amp bf16"),
        ("--clock cpu --whole", "--clock cpu is for --device cpu without --whole"),
        ("--whole --num_queries_one2many 15 --k_one2many 3", "matches an object once only"),
        ("--output nowhere/at/all.json", "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_timed_is_refused_with_the_way_out(flags: str, message: str, capsys) -> None:
    assert main(f"{SMALL} --queries 8 --objects 1 {flags}".split()) == 2
    assert message in capsys.readouterr().err


def test_defaults_of_a_processor_are_smaller_than_those_of_a_gpu() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        own = bench_match.get_parser().parse_args([])
        bench_match.fill_in(own, torch.device(device))
        found[device] = own
    assert (found["cpu"].repeats, found["cpu"].warmup, found["cpu"].batches) == (10, 2, [2])
    assert (found["cuda"].repeats, found["cuda"].warmup, found["cuda"].batches) == (200, 20, [2, 16])
    assert found["cpu"].queries == found["cuda"].queries == [100, 300, 900, 1800]
