"""Processes: how they find each other, who prints, what they exchange.

Everything here works without a process group too; a single process is rank 0 of 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from util.errors import UserError


@dataclass(frozen=True)
class Launch:
    """What the launcher says about this process."""

    rank: int
    world_size: int
    local_rank: int | None  # position on this machine; None = the launcher does not say
    master: dict[str, str]  # MASTER_ADDR and MASTER_PORT where the launcher leaves them to us


def read_launch(env: Mapping[str, str], local_rank_flag: int | None = None) -> Launch | None:
    """Return what the environment says about this process, None for a single process.

    Understands torchrun, `torch.distributed.launch` in every spelling, a hand-written RANK/WORLD_SIZE environment and
    SLURM steps (`srun`). The environment wins over `--local-rank`. A shell of `salloc` or `sbatch` is one process: only
    what `srun` starts has a step.

    Args:
        env: the environment variables.
        local_rank_flag: value of `--local-rank`, None when it was not given.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        local = int(env["LOCAL_RANK"]) if "LOCAL_RANK" in env else local_rank_flag
        return Launch(int(env["RANK"]), int(env["WORLD_SIZE"]), local, {})
    # In the interactive step of `salloc` the allocation may have many tasks and the step has one.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and tasks > 1:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
        # A port from the job id, so that two jobs on one machine do not meet.
        port = 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
        master = {"MASTER_ADDR": first_host(nodes), "MASTER_PORT": str(port)}
        return Launch(int(env["SLURM_PROCID"]), tasks, int(env.get("SLURM_LOCALID", 0)), master)
    return None


def first_host(nodes: str) -> str:
    """Return the first machine of a SLURM node list such as `gpu[003-007,12],login` (here `gpu003`)."""
    if shutil.which("scontrol"):
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if listed.returncode == 0 and listed.stdout.strip():
            return listed.stdout.split()[0]
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else "127.0.0.1"


def init_distributed_mode(device: str, local_rank_flag: int | None, timeout_minutes: int) -> torch.device:
    """Join the process group if there is one to join and return the device of this process.

    Args:
        device: value of `--device`; `auto` is a GPU if there is one, else the CPU.
        local_rank_flag: value of `--local-rank` or None.
        timeout_minutes: after this long a hanging collective is an error.

    Raises:
        UserError: a device that is not here, or a launch that says too little.
    """
    launch = read_launch(os.environ, local_rank_flag)
    if launch is None:
        chosen = pick_device(device)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # what names no device, such as events and peaks of memory, means this one
        return chosen
    local = launch.local_rank
    if local is None:
        local = launch.rank % (torch.cuda.device_count() or launch.world_size)
    chosen = pick_device(device, local)
    for name, value in launch.master.items():
        os.environ.setdefault(name, value)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK and WORLD_SIZE are set, {' and '.join(missing)} not: start with torchrun, or set all of them, "
            "or unset RANK and WORLD_SIZE for a single process"
        )
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(local))
    on_gpu = chosen.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        device_id=chosen if on_gpu else None,
    )
    return chosen


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device that `--device` names; of several GPUs that of the process `local_rank`.

    Raises:
        UserError: a device that is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: use auto, cuda, cuda:N, cpu or mps") from error
    if device.type not in ("cuda", "cpu", "mps"):
        raise UserError(f"--device {name}: use auto, cuda, cuda:N, cpu or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has none; use --device cpu")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu, or check nvidia-smi and the build")
    index = local_rank if local_rank is not None else device.index or 0
    if index >= count:
        raise UserError(f"GPU {index} was asked for, this machine shows {count}: start at most {count} processes on it")
    return torch.device("cuda", index)


def shutdown() -> None:
    """Leave the process group, if any."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Say whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Say whether this process is the one that prints and writes."""
    return rank() == 0


def local_world_size() -> int:
    """Return the number of processes on this machine (not its number of GPUs)."""
    if not is_distributed():
        return 1
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name in os.environ:
            return int(re.match(r"\d+", os.environ[name]).group())  # SLURM writes 4(x2) for two machines with four
    return min(world_size(), torch.cuda.device_count() or world_size())


def local_rank() -> int:
    """Return the number of this process on its machine; for sharing files, not for choosing a GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_distributed() else 0


def barrier() -> None:
    """Wait for the other processes."""
    if is_distributed():
        dist.barrier()


@contextmanager
def local_main_first() -> Iterator[None]:
    """Let one process per machine run the block before the others (a download that the others find in the cache)."""
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add `tensor` up over processes, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def everywhere(flag: Tensor) -> Tensor:
    """Return, on its device, whether the boolean scalar `flag` is true in every process."""
    if not is_distributed():
        return flag
    number = flag.to(torch.int32)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return number > 0


def broadcast_buffers(module: nn.Module) -> None:
    """Give every process the buffers of the main one: running statistics of trained norms are of its own images."""
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Return `value` of every process, in the order of ranks."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    with warnings.catch_warnings():  # the storages behind pickled tensors are PyTorch's own business
        warnings.simplefilter("ignore")
        dist.all_gather_object(gathered, value)
    return gathered


def info(*values: object) -> None:
    """Print in the main process only, at once."""
    if is_main():
        print(*values, flush=True)
