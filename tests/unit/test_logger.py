"""Averages, progress lines and log.txt."""

import json
import sys

import pytest
import torch

from util.logger import Meters, Progress, RunLog
from util.structures import LossReport


def scalars(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def report(ce: float, error: float = 0.0) -> LossReport:
    terms = scalars(loss_ce=ce, class_error=error)
    return LossReport(total=2.0 * terms["loss_ce"], terms=terms, weights={"loss_ce": 2.0})


def test_averages_are_over_all_steps_and_recent_ones_since_the_last_look():
    meters = Meters()
    for value in (1.0, 3.0):
        meters.update(scalars(a=value))
    assert meters.averages() == {"a": 2.0}
    meters.update(scalars(a=8.0))
    assert meters.averages() == {"a": 4.0}
    assert meters.recent == {"a": 8.0}


def test_entries_that_come_rarely_are_averaged_over_their_own_count():
    meters = Meters()
    meters.update(scalars(a=1.0))
    meters.update(scalars(a=3.0, b=5.0))
    assert meters.averages() == {"a": 2.0, "b": 5.0}


def test_losses_are_logged_weighted_and_unscaled_as_the_family_does():
    meters = Meters()
    meters.update_losses(report(ce=1.0, error=50.0))
    meters.update_losses(report(ce=2.0, error=100.0))
    assert meters.averages() == {
        "loss": 3.0,
        "class_error": 75.0,
        "loss_ce": 3.0,
        "loss_ce_unscaled": 1.5,
        "class_error_unscaled": 75.0,
    }


def test_averages_continue_from_their_state():
    first, second = Meters(), Meters()
    first.update_losses(report(ce=1.0))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.update_losses(report(ce=2.0))
    assert second.averages()["loss_ce"] == 3.0


def test_progress_prints_the_first_and_the_last_line_and_every_so_many(capsys):
    meters = Meters()
    for _ in Progress("Epoch: [3]", 8, start=1, print_freq=3).over(range(7), meters, {"lr": lambda: "0.1"}):
        meters.update(scalars(loss=2.0))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[1].strip(" [") for line in lines] == ["4/8", "7/8", "8/8"]
    assert all("eta: " in line and "lr: 0.1" in line and "loss: 2.0000 (2.0000)" in line for line in lines)


def test_the_log_has_one_json_line_per_epoch(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"epoch": 0, "train_loss": 1.5})
    log.write({"epoch": 1, "test_coco_eval_bbox": [0.1] * 12})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [0, 1]


def test_a_line_cut_off_by_a_killed_run_spoils_no_other(tmp_path):
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1, "trai')
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"epoch": 1})
    assert log.entries() == [{"epoch": 0}, {"epoch": 1}]


def test_without_a_folder_nothing_is_written():
    log = RunLog(None)
    log.write({"epoch": 0})
    assert log.entries() == []


def test_a_missing_tensorboard_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    RunLog(tmp_path).write({"epoch": 0})
    assert capsys.readouterr().out.startswith("TensorBoard is not installed")
    assert (tmp_path / "log.txt").is_file()


def test_tensorboard_gets_every_number(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path)
    log.write({"epoch": 4, "train_loss": 1.5, "test_coco_eval_bbox": [0.25] + [0.0] * 11})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 1.5
    assert events.Scalars("test/coco_eval_bbox_AP")[0].step == 4
