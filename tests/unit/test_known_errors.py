"""Errors of PyTorch that a user can mend are told with the way out, all others keep their traceback."""

from __future__ import annotations

import os
import re
import signal
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import main
from util import dist
from util.args import get_args_parser
from util.known_errors import ALLOCATOR, explain, less_memory

CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.06 GiB is "
    "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs)"
)


def parsed(flags: str = "") -> Namespace:
    return get_args_parser().parse_args(flags.split())


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # mps and cuBLAS raise the latter
def test_out_of_memory_names_what_the_command_line_leaves_open(kind: type[RuntimeError]) -> None:
    text = explain(kind(CUDA_TEXT), parsed("--batch_size 4 --grad_accum_steps 3 --num_queries_one2many 1500"))
    assert text.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert text.count("expandable_segments") == torch.cuda.is_available()  # the advice of PyTorch is not repeated
    for way in (
        "--use_checkpoint",
        "--batch_size 2 --grad_accum_steps 6",
        "--amp",
        "--max_size (now 1333)",
        "--num_queries_one2many (now 1500)",
    ):
        assert way in text
    assert "dn_number" not in text


def test_an_allocation_that_the_host_refuses_is_out_of_memory_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert explain(caught.value, parsed()).startswith("out of memory: ")


def test_ways_that_were_taken_are_not_named_again() -> None:
    (way,) = less_memory(parsed("--use_checkpoint --batch_size 1 --amp --augment lsj"))[-1:]
    assert way.startswith("smaller images: a lower --lsj_size (now 1024)")
    taken = " ".join(less_memory(parsed("--use_checkpoint --batch_size 1 --amp")))
    assert not any(flag in taken for flag in ("--use_checkpoint", "--batch_size", "--amp"))


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ("--eval --resume a.pth --eval_batch_size 8", "--eval_batch_size 1 (now 8)"),
        ("--infer a.jpg --resume a.pth --infer_batch_size 4", "--infer_batch_size 1 (now 4)"),
    ],
)
def test_without_training_nothing_is_said_about_training(flags: str, first: str) -> None:
    ways = less_memory(parsed(flags))
    assert ways[0] == first
    assert not any("grad_accum" in way or "--use_checkpoint" in way for way in ways)


def test_the_setting_of_the_allocator_is_proposed_where_there_is_a_gpu_and_it_is_not_set(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(ALLOCATOR, raising=False)
    assert less_memory(parsed())[0].startswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in front")
    monkeypatch.setenv(ALLOCATOR, "expandable_segments:True")
    assert "expandable" not in " ".join(less_memory(parsed()))


def test_every_way_out_is_a_flag_that_exists() -> None:
    args = parsed("--batch_size 3 --eval_batch_size 2 --num_queries_one2many 9 --dn_number 5")
    flags = set(re.findall(r"--\w+", " ".join(less_memory(args))))
    assert {"--dn_number", "--batch_size", "--grad_accum_steps"} <= flags
    assert flags <= {name for action in get_args_parser()._actions for name in action.option_strings}


class Half(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_parameters_without_a_gradient_in_several_processes_are_explained(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = nn.parallel.DistributedDataParallel(Half())
        step(torch.ones(1, 2)).sum().backward()
        with pytest.raises(RuntimeError) as caught:
            step(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    text = explain(caught.value, parsed())
    assert text.startswith("some parameters took no part in the loss. Parameter indices which did not receive grad")
    assert "for rank 0: 2 3\n" in text
    assert "--find_unused_params" in text


class Deadly(Dataset):
    """Kills the process that reads it, as the system does when memory runs out."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_loader_process_that_was_killed_is_explained() -> None:
    # A process of its own: a fork of this one inherits what the threads of earlier tests hold, and may wait for ever.
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Deadly(), num_workers=1, multiprocessing_context="spawn")))
    text = explain(caught.value, parsed("--num_workers 7"))
    assert text.startswith("DataLoader worker (pid")
    assert "fewer --num_workers (now 7)" in text


def test_a_port_that_is_taken_is_named(monkeypatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launch.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RuntimeError) as caught:
            dist.init_distributed_mode("cpu", None, 1)
        assert explain(caught.value, parsed()).startswith(f"port {port} is taken by another run on this machine")


def test_the_program_ends_with_the_way_out_and_without_a_traceback(monkeypatch, capsys) -> None:
    def run(args: Namespace) -> None:
        raise torch.OutOfMemoryError(CUDA_TEXT)

    monkeypatch.setattr(main, "run", run)
    assert main.main([]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: CUDA out of memory.")


def test_a_fault_of_the_code_is_raised(monkeypatch) -> None:
    def run(args: Namespace) -> None:
        raise RuntimeError("shape '[2]' is invalid for input of size 3")

    monkeypatch.setattr(main, "run", run)
    with pytest.raises(RuntimeError, match="is invalid for input"):
        main.main([])
