"""Curves come from log.txt alone and survive what happens to it."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from util import plot
from util.errors import UserError
from util.plot import curve, main, plot_run, plot_runs, read_log


def write_log(folder: Path, *entries: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def entry(epoch: int, loss: float, ap: float | None = None) -> dict:
    found = {"epoch": epoch, "train_lr": 1e-4, "train_loss": loss, "train_loss_ce": loss / 4, "train_class_error": 50.0}
    if ap is not None:
        found |= {"test_loss": loss + 1, "test_coco_eval_bbox": [ap, 0.5, 0.4, -1.0, 0.3, 0.2] + [0.5] * 6}
    return found


def test_the_later_line_of_an_epoch_written_twice_counts(tmp_path: Path) -> None:
    write_log(tmp_path, entry(0, 9.0), entry(1, 8.0), entry(1, 7.0), entry(2, 6.0))
    assert curve(read_log(tmp_path), lambda e: e["train_loss"]) == ([1, 2, 3], [9.0, 7.0, 6.0])


def test_a_line_cut_off_by_a_killed_run_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, entry(0, 9.0))
    with (tmp_path / "log.txt").open("a") as log:
        log.write('{"epoch": 1, "train_lo')
    assert [e["epoch"] for e in read_log(tmp_path)] == [0]


def test_epochs_without_a_value_are_no_points_of_a_curve() -> None:
    entries = [entry(0, 9.0), entry(1, 8.0, ap=0.1), entry(2, 7.0), entry(3, 6.0, ap=0.2)]
    assert curve(entries, lambda e: e.get("test_loss")) == ([2, 4], [9.0, 7.0])


def test_a_run_is_drawn_when_only_some_epochs_were_evaluated(tmp_path: Path) -> None:
    write_log(tmp_path, entry(0, 9.0), entry(1, 8.0, ap=0.1), entry(2, 7.0))
    written = plot_run(tmp_path)
    assert [path.name for path in written] == ["loss.png", "ap.png"]
    for path in written:
        assert Image.open(path).width > 800


def test_one_epoch_is_enough(tmp_path: Path) -> None:
    assert len(plot_run(write_log(tmp_path, entry(0, 9.0, ap=0.1)))) == 2


def test_a_run_that_was_never_evaluated_has_no_ap_picture(tmp_path: Path) -> None:
    assert [path.name for path in plot_run(write_log(tmp_path, entry(0, 9.0)))] == ["loss.png"]


def panels_of(monkeypatch) -> dict[str, list[str]]:
    """Return what will hold the labels of every panel of `health.png`, by title."""
    panels, draw = {}, plot._health_figure

    def remember(plt, runs):
        figure = draw(plt, runs)
        drawn = [axes for axes in figure.axes if axes.has_data()]
        panels.update({axes.get_title(): [t.get_text() for t in axes.get_legend().get_texts()] for axes in drawn})
        return figure

    monkeypatch.setattr(plot, "_health_figure", remember)
    return panels


def test_a_learned_matcher_has_its_health_drawn_with_what_would_be_alarming(tmp_path: Path, monkeypatch) -> None:
    panels, measures = panels_of(monkeypatch), ("distinct", "unassigned", "c_max", "agree", "regret", "dup")
    numbers = {f"{part}_{name}_unscaled": 0.5 for name in measures for part in ("train", "test")}
    written = plot_run(write_log(tmp_path, entry(0, 9.0) | numbers, entry(1, 8.0) | numbers | {"test_flip": 0.25}))
    assert [path.name for path in written] == ["loss.png", "health.png"]
    assert panels["distinct queries per object (distinct)"] == ["train", "test", "below 0.7: collapse"]
    assert panels["cost above the optimum (regret)"] == ["train", "test"]
    assert panels["objects with another query than before (flip)"] == ["test"]
    assert len(panels) == 7


def test_health_has_the_measures_that_some_run_has(tmp_path: Path, monkeypatch) -> None:
    panels = panels_of(monkeypatch)
    greedy = entry(0, 9.0) | {"train_unassigned_unscaled": 0.0, "test_agree_unscaled": 0.9}
    runs = [write_log(tmp_path / "greedy", greedy), write_log(tmp_path / "exact", entry(0, 9.0) | {"test_dup": 0.1})]
    plot_runs(runs, tmp_path)
    assert panels["agreement with Hungarian (agree)"] == ["greedy, test", "below 0.3 late: poor choice"]
    assert panels["surplus detections per object (dup)"] == ["exact, test", "healthy below 0.2"]
    assert len(panels) == 3


def test_runs_are_drawn_together_even_with_equal_folder_names(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / part / "run", entry(0, 9.0, ap=0.1)) for part in ("a", "b")]
    assert [path.parent.name for path in plot_runs(runs, tmp_path / "compare")] == ["compare", "compare"]


def test_the_command_line_draws_into_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    write_log(tmp_path, entry(0, 9.0, ap=0.1))
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "loss.png"), str(tmp_path / "ap.png")]


@pytest.mark.parametrize("content", [None, "", "not json\n", '{"n_parameters": 3}\n'])
def test_a_folder_without_a_usable_log_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.txt").write_text(content)
    with pytest.raises(UserError, match=r"log\.txt"):
        plot_run(tmp_path)


def test_missing_matplotlib_is_said_with_the_way_out(tmp_path: Path, monkeypatch) -> None:
    write_log(tmp_path, entry(0, 9.0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_run(tmp_path)
