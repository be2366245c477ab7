"""One table of several runs, seeds side by side."""

import json
from pathlib import Path

import pytest

from util.run_table import main, number, table


def run(folder: Path, name: str, **test: float) -> Path:
    """Write the log of a run of two epochs, the last of which has the numbers `test`."""
    path = folder / name
    path.mkdir(parents=True)
    entries = [{"epoch": 0, "test_AP": 0.1}, {"epoch": 1, **{f"test_{key}": value for key, value in test.items()}}]
    (path / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_a_number_is_that_of_the_last_epoch(tmp_path: Path) -> None:
    assert number(run(tmp_path, "a", AP=0.5), "AP") == 0.5


def test_a_term_that_the_log_calls_unscaled_is_found_by_its_name(tmp_path: Path) -> None:
    assert number(run(tmp_path, "a", agree_unscaled=0.75), "agree") == 0.75


def test_a_number_of_an_evaluation_is_read_from_its_folder(tmp_path: Path) -> None:
    path = run(tmp_path, "a", AP=0.5)
    assert number(path, "nms/AP") is None
    (path / "nms" / "eval").mkdir(parents=True)
    (path / "nms" / "eval" / "stats.json").write_text('{"AP": 0.6}')
    assert number(path, "nms/AP") == 0.6


def test_no_such_object_is_no_number(tmp_path: Path) -> None:
    assert number(run(tmp_path, "a", APl=-1.0), "APl") is None
    assert number(run(tmp_path, "b", regret=-1.0), "regret") == -1.0


def test_seeds_share_a_row_in_ascending_order_behind_their_mean(tmp_path: Path) -> None:
    runs = [run(tmp_path, f"soft_seed{seed}", AP=ap, agree=0.5) for seed, ap in ((10, 0.7), (2, 0.5))]
    runs.append(run(tmp_path, "hungarian", AP=0.4321))
    assert table(runs, ["AP", "agree", "dup"]).splitlines() == [
        "|  | AP | agree |",
        "|---|---|---|",
        "| soft | 60.0 (50.0, 70.0) | 0.500 (0.500, 0.500) |",
        "| hungarian | 43.2 | - |",
    ]


def test_two_folders_of_one_row_and_seed_are_refused_with_both_names(tmp_path: Path, capsys) -> None:
    runs = [run(tmp_path / folder, "soft_seed1", AP=0.5) for folder in ("a", "b")]
    assert main([str(path) for path in runs]) == 2
    assert f"{runs[0]} and {runs[1]} are both the row soft, seed 1: give one of them" in capsys.readouterr().err
    plain = [run(tmp_path, "soft", AP=0.5), run(tmp_path, "soft_seed2", AP=0.7)]
    assert "| soft | 60.0 (50.0, 70.0) |" in table(plain, ["AP"])


def test_without_a_choice_all_measures_of_matchers_are_shown(tmp_path: Path, capsys) -> None:
    run(tmp_path, "a", AP=0.5, c_max_unscaled=0.9, pos_per_gt_unscaled=1.5, agree_small_unscaled=0.25)
    assert main([str(tmp_path / "a")]) == 0
    assert "|  | AP | agree_small | c_max | pos_per_gt |" in capsys.readouterr().out


def test_a_seed_without_a_value_is_left_out_of_the_mean(tmp_path: Path) -> None:
    runs = [run(tmp_path, "a_seed1", AP=0.5), run(tmp_path, "a_seed2", AP=-1.0)]
    assert "| a | 50.0 (50.0, -) |" in table(runs, ["AP"])


def test_the_table_is_written_where_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run(tmp_path, "a", AP=0.5)
    assert main([str(path), "--output", str(tmp_path / "new" / "table.md")]) == 0
    assert (tmp_path / "new" / "table.md").read_text() == "|  | AP |\n|---|---|\n| a | 50.0 |\n"
    assert "table.md" in capsys.readouterr().out


def test_a_folder_without_a_log_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"no {tmp_path / 'log.txt'}" in capsys.readouterr().err
