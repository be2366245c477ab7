"""`main.py --plot RUN ...`: curves of several runs in the same pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

import main
from tests.unit.test_plot import entry, write_log
from util import plot


@pytest.fixture
def drawn(monkeypatch) -> dict[str, dict[str, list]]:
    """What will hold, by picture and panel, (label, points) of every line; writing is left out, it is the slow part."""
    pictures = {}

    def remember(plt, figure, path):
        pictures[path.name] = {
            axes.get_title(): [(line.get_label(), line.get_xydata().tolist()) for line in axes.get_lines()]
            for axes in figure.axes
        }
        plt.close(figure)
        return path

    monkeypatch.setattr(plot, "_save", remember)
    return pictures


def plotted(*argv: str | Path) -> int:
    return main.main(["--plot", *map(str, argv)])


def test_runs_of_unequal_length_share_every_panel(tmp_path, drawn, capsys):
    long = write_log(tmp_path / "long", *(entry(i, 9.0 - i, ap=0.1 * i) for i in range(3)))
    short = write_log(tmp_path / "short", entry(0, 5.0, ap=0.3))
    assert plotted(long, short, "--output_dir", tmp_path / "both") == 0
    assert drawn["loss.png"]["total loss"] == [
        ("long, train", [[1, 9], [2, 8], [3, 7]]),
        ("long, test", [[1, 10], [2, 9], [3, 8]]),
        ("short, train", [[1, 5]]),
        ("short, test", [[1, 6]]),
    ]
    assert drawn["ap.png"]["AP"] == [("long 0.200", [[1, 0], [2, 0.1], [3, 0.2]]), ("short 0.300", [[1, 0.3]])]
    assert set(drawn["ap.png"]) == {"AP", "AP50", "AP75", "AP small", "AP medium", "AP large"}
    assert f"wrote {tmp_path / 'both' / 'ap.png'}" in capsys.readouterr().out


def test_a_key_that_a_run_lacks_costs_it_only_its_line(tmp_path, drawn):
    plain = {key: value for key, value in entry(0, 9.0).items() if key != "train_class_error"}
    runs = [write_log(tmp_path / "a", plain), write_log(tmp_path / "b", entry(0, 8.0, ap=0.5))]
    assert plotted(*runs, "--output_dir", tmp_path) == 0
    assert [label for label, _ in drawn["loss.png"]["class error, %"]] == ["b, train"]
    assert drawn["loss.png"]["GIoU loss"] == []
    assert [label for label, _ in drawn["ap.png"]["AP50"]] == ["b 0.500"]
    assert drawn["ap.png"]["AP small"] == []  # -1: there are no small objects


def test_averaged_weights_have_lines_of_their_own(tmp_path, drawn):
    averaged = {"ema_test_coco_eval_bbox": [0.25] * 12, "ema_test_loss": 4.5}
    run = write_log(tmp_path / "run", entry(0, 9.0, ap=0.1) | averaged)
    assert plotted(run) == 0
    assert ("test EMA", [[1, 4.5]]) in drawn["loss.png"]["total loss"]
    labels = [label for label, _ in drawn["ap.png"]["average precision"]]
    assert labels == ["AP 0.100", "AP EMA 0.250", "AP50 0.500", "AP50 EMA 0.250", "AP75 0.400", "AP75 EMA 0.250"]
    other = write_log(tmp_path / "other", entry(0, 9.0, ap=0.1))
    assert plotted(run, other, "--output_dir", tmp_path) == 0
    assert [label for label, _ in drawn["ap.png"]["AP"]] == ["run 0.100", "run EMA 0.250", "other 0.100"]


def test_a_run_named_twice_is_drawn_once(tmp_path, drawn):
    run = write_log(tmp_path / "run", entry(0, 9.0))
    assert plotted(run, run, "--output_dir", tmp_path) == 0
    assert [label for label, _ in drawn["loss.png"]["total loss"]] == ["train"]


def test_every_run_that_cannot_be_read_is_named(tmp_path, drawn, capsys):
    good = write_log(tmp_path / "good", entry(0, 9.0))
    assert plotted(good, tmp_path / "absent", tmp_path / "gone", "--output_dir", tmp_path) == 2
    message = capsys.readouterr().err
    assert "absent/log.txt" in message and "gone/log.txt" in message and "good" not in message
    assert not drawn


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--plot a b", "say with --output_dir where the pictures go"),
        ("--plot a --eval --resume x.pth", "only reads finished output folders"),
        ("--report a --strip x.pth", "only reads finished output folders"),
        ("--plot a --report a", "give one of them"),
        ("--report a --report_images -1", "--report_images -1: must be 0 or more"),
        ("--confusion_score 1.5", "--confusion_score 1.5: a score, 0 to 1"),
        ("--confusion_score 0.5 --no-eval_curves", "leave out --no-eval_curves"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(flags, message, capsys):
    assert main.main(flags.split()) == 2
    assert message in capsys.readouterr().err
