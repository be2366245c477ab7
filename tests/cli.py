"""Runs of `main.py` on a tiny model and a tiny synthetic set, in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from main import main

ROOT = Path(__file__).resolve().parents[1]
FLAGS = (
    "--device cpu --dataset_file synthetic --synthetic_train 16 --synthetic_val 5 --synthetic_size 64 64 "
    "--augment flip --test_size 0 --num_workers 0 --backbone resnet18 --backbone_weights none --hidden_dim 32 "
    "--nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --num_queries 8 --num_feature_levels 3 "
    "--batch_size 2 --epochs 2 --lr 0.001 --draw 0 --print_freq 1 --no-tensorboard "
    "--no-eval_curves"
)


def flags(output_dir: Path | str, more: str = "") -> list[str]:
    """Return the command line of a run; `more` wins."""
    return f"{FLAGS} --output_dir={output_dir} {more}".split()


def run(output_dir: Path | str, more: str = "") -> int:
    """Run `main` here with one thread, as the processes of `start` do; return its exit code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return main(flags(output_dir, more))
    finally:
        torch.set_num_threads(threads)


def start(command: list[str], **options) -> subprocess.Popen:
    """Start a Python process in the root of the project, its output in one pipe."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env.update(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, seconds: float = 120) -> str:
    """Wait for `process` and return what it printed; kills it when it hangs."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
