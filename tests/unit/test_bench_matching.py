"""The benchmark of matching: what it compares and prints."""

from __future__ import annotations

import json

import pytest
import torch

from util import bench_matching
from util.bench_matching import get_parser, main, object_counts, solver_case, step_case, table
from util.benchmark import main as benchmark

SMALL = "--batch_size 2 --layers 2 --repeats 1".split()


def test_images_have_about_seven_objects_and_none_has_more_than_sixty() -> None:
    counts = object_counts(4000, 0)
    assert 6.5 < sum(counts) / 4000 < 8
    assert min(counts) >= 1 and max(counts) <= 60


@pytest.mark.parametrize("shape", ["trained", "scratch"])
def test_both_ways_of_a_step_and_both_solvers_find_pairs_of_the_same_cost(shape: str) -> None:
    own = get_parser().parse_args(SMALL)
    torch.manual_seed(0)
    assert step_case(own, 80, 1, shape).apart < 1e-5
    assert step_case(own, 150, 2, shape).apart < 1e-5
    assert solver_case(own, 60, 5, 3, shape).apart < 1e-6


def test_the_ratio_is_that_of_each_repetition() -> None:
    text = table({"step": (0.0, {"published": [10.0, 20.0, 30.0], "ours": [1.0, 4.0, 3.0]})})
    assert text.splitlines()[-1] == (
        "| step | 20.00 (10.00 to 30.00) | 3.00 (1.00 to 4.00) | 10.0 (5.0 to 10.0) | 0e+00 |"
    )


def test_it_runs_by_name_prints_a_table_and_saves_all_numbers(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(bench_matching, "STEPS", ((20, 1),))
    monkeypatch.setattr(bench_matching, "PROBLEMS", ((20, 3, 2),))
    file = tmp_path / "times.json"
    assert benchmark(["matching", *SMALL, "--shapes", "trained", "--threads", "0", "--output", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "wall clock" in printed and "| solver: 20 x 3, K = 2, trained |" in printed
    content = json.loads(file.read_text())
    results = content["results"]
    assert [figure["case"]["name"] for figure in content["figures"]] == list(results)
    assert [figure["case"]["batch"] for figure in content["figures"]] == [2, bench_matching.AT_ONCE]
    assert all(len(set(figure["ours"])) == 1 for figure in content["figures"])  # of one repetition
    assert len(results) == 2 and all(len(found["ms"]["ours"]) == 1 for found in results.values())


def test_pairs_that_cost_too_much_and_mistakes_have_exit_states_of_their_own(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_matching, "run", lambda own: {"solver: x": (1e-5, {}), "step: x": (1e-5, {})})
    assert main(SMALL) == 1
    monkeypatch.setattr(bench_matching, "run", lambda own: {"step: x": (1e-5, {})})
    assert main(SMALL) == 0
    monkeypatch.undo()
    assert main(["--repeats", "0"]) == 2
    assert "--repeats 0: must be at least 1" in capsys.readouterr().err
