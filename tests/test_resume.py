"""A run that was stopped, in whatever way, ends with the numbers of one that was not: bit for bit on a CPU."""

import argparse
import json
import signal
from pathlib import Path

import pytest
import torch

from tests.cli import finish, flags, run, start
from util.checkpoint import read_checkpoint, write_atomically

# Dropout, flips, an average and two accumulated batches: everything that has a state.
MORE = "--use_ema --grad_accum_steps 2 --warmup_steps 5 --save_steps 1 --lr_drop 1 --dropout 0.1"

# A process killed with the temporary file half on disk, as a power cut or the memory killer would leave it.
KILLED_WHILE_SAVING = """
import os, signal, sys, torch
whole_save, calls = torch.save, []
def save(content, file):
    whole_save(content, file)
    calls.extend(["optimizer"] if "optimizer" in content else [])
    if len(calls) == 6:  # in the second epoch
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
from main import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(folder, MORE) == 0
    return folder


def assert_equal(ours, theirs, where: str = "") -> None:
    """Compare nested content bit by bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), f"{where} differs"
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs)):
            assert_equal(a, b, f"{where}.{i}")
    else:
        assert ours == theirs, f"{where}: {ours} and {theirs}"


def assert_same_run(folder: Path, reference: Path) -> None:
    ours, theirs = (read_checkpoint(f / "checkpoint.pth") for f in (folder, reference))
    for part in ("model", "optimizer", "lr_scheduler", "ema", "epoch", "rng", "best"):
        assert_equal(ours[part], theirs[part], part)
    logs = [[json.loads(line) for line in (f / "log.txt").read_text().splitlines()] for f in (folder, reference)]
    assert [entry["epoch"] for entry in logs[0]] == [entry["epoch"] for entry in logs[1]]
    # Times are of the machine; `flip` compares with the evaluation before, which a new process does not know.
    apart = {"train_epoch_time", "train_max_memory_mb", "test_flip", "ema_test_flip"}
    for mine, other in zip(*logs):
        assert mine.keys() - apart == other.keys() - apart
        for key in other:
            if key not in apart:
                assert mine[key] == pytest.approx(other[key], rel=1e-5), key


def test_a_run_killed_in_the_middle_of_an_epoch_continues_exactly(uninterrupted, tmp_path):
    process = start(["main.py", *flags(tmp_path, MORE)])
    for line in process.stdout:
        if line.startswith("Epoch: [1] [5/8]"):
            process.send_signal(signal.SIGKILL)
            break
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert 0 < read_checkpoint(tmp_path / "checkpoint.pth")["step"] < 8
    assert run(tmp_path, f"{MORE} --resume auto") == 0
    assert_same_run(tmp_path, uninterrupted)


def test_a_run_killed_in_the_middle_of_saving_continues_exactly(uninterrupted, tmp_path, capsys):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WHILE_SAVING)
    folder = tmp_path / "run"
    process = start([str(script), *flags(folder, MORE)])
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert [p.name for p in folder.glob("*.tmp")] == ["checkpoint.pth.tmp"]
    assert run(folder, f"{MORE} --resume auto") == 0
    assert "left half written by a killed run" in capsys.readouterr().out
    assert not list(folder.glob("*.tmp"))
    assert_same_run(folder, uninterrupted)


def test_a_run_with_auxiliary_heads_continues_exactly_after_an_epoch(tmp_path):
    more = f"{MORE} --aux_heads atss faster_rcnn --roi_samples 16"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole, more) == 0
    assert run(stopped, f"{more} --epochs 1") == 0
    names = read_checkpoint(stopped / "checkpoint.pth")["model"]
    assert all(any(n.startswith(f"groups.co.heads.{head}.") for n in names) for head in ("atss", "faster_rcnn"))
    assert run(stopped, f"{more} --resume auto") == 0
    assert_same_run(stopped, whole)


def test_a_run_stopped_between_saving_and_evaluating_makes_up_for_the_evaluation(uninterrupted, tmp_path, monkeypatch):
    import main

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, "finish_epoch", stopped)
        assert run(tmp_path, MORE) == 130
    assert not (tmp_path / "log.txt").exists()
    assert run(tmp_path, f"{MORE} --resume auto") == 0
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_says_that_nothing_is_left_to_do(uninterrupted, tmp_path, capsys):
    checkpoint = uninterrupted / "checkpoint.pth"
    (tmp_path / "log.txt").write_text((uninterrupted / "log.txt").read_text())
    assert run(tmp_path, f"{MORE} --resume {checkpoint}") == 0
    assert "nothing left to do: epoch 1 of 2 is done" in capsys.readouterr().out


def test_changed_rates_of_the_command_line_win_and_are_told(uninterrupted, tmp_path, capsys):
    checkpoint = uninterrupted / "checkpoint.pth"
    assert run(tmp_path, f"{MORE} --resume {checkpoint} --lr 0.004 --lr_drop 3 --epochs 3 --weight_decay 0.5") == 0
    text = capsys.readouterr().out
    for change in ("--lr was 0.001", "--lr_drop was 1", "--epochs was 2", "--weight_decay was 0.0001"):
        assert change in text
    resumed = read_checkpoint(tmp_path / "checkpoint.pth")
    assert resumed["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])["train_lr"] == pytest.approx(0.004)
    assert resumed["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0004)  # dropped for the next epoch


def published(own: Path, target: Path) -> None:
    """Write what the original code would have written at the end of the epoch of `own`."""
    content = read_checkpoint(own)
    args = argparse.Namespace(**content["args"])
    schedule = {"step_size": 40, "gamma": 0.1, "base_lrs": [1.0] * 3, "last_epoch": content["epoch"] + 1}
    parts = {name: content[name] for name in ("model", "optimizer", "epoch")}
    torch.save({**parts, "lr_scheduler": schedule, "args": args}, target)


def test_a_published_file_continues_with_the_rates_of_the_command_line(uninterrupted, tmp_path, capsys):
    published(uninterrupted / "checkpoint.pth", tmp_path / "published.pth")
    more = MORE.replace("--lr_drop 1", "--lr_drop 2") + " --lr 0.01 --weight_decay 0.5 --epochs 3"
    assert run(tmp_path, f"{more} --resume {tmp_path}/published.pth") == 0
    entries = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [2]
    assert entries[0]["train_lr"] == pytest.approx(0.01 * 0.1)  # two epochs done, one drop
    group = read_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.0001  # the published rule: from the file
    assert "holds no averaged weights" in capsys.readouterr().out


def test_a_file_with_weights_only_starts_at_the_given_epoch(uninterrupted, tmp_path, capsys):
    weights = read_checkpoint(uninterrupted / "checkpoint.pth")["model"]
    write_atomically({"model": weights, "optimizer": {}, "lr_scheduler": None, "epoch": 49}, tmp_path / "weights.pth")
    assert run(tmp_path, f"--resume {tmp_path}/weights.pth --start_epoch 1") == 0
    assert "weights only: training starts at epoch 1" in capsys.readouterr().out
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [1]


@pytest.mark.parametrize("change", ["--sgd", "--freeze input_proj"])
def test_an_optimiser_that_does_not_fit_is_refused(uninterrupted, tmp_path, change, capsys):
    assert run(tmp_path, f"{MORE} {change} --resume {uninterrupted}/checkpoint.pth") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the optimiser in") and "--freeze" in error


def test_other_batches_restart_the_epoch_they_were_in(uninterrupted, tmp_path, capsys):
    content = read_checkpoint(uninterrupted / "checkpoint.pth")
    write_atomically({**content, "epoch": 0, "step": 4}, tmp_path / "middle.pth")
    assert run(tmp_path, f"{MORE} --batch_size 4 --resume {tmp_path}/middle.pth") == 0
    text = capsys.readouterr().out
    assert "epoch 1 starts again at its first batch" in text
    assert "Epoch: [1] [1/4]" in text
