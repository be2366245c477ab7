"""Several processes compute what one would, hang on nothing, and start under every launcher."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from models import build_model
from tests.cli import finish, flags, run, start
from tests.tiny import make_target, tiny_args, tiny_images, tiny_targets
from util import dist
from util.checkpoint import read_checkpoint
from util.dist import Launch, first_host, read_launch
from util.engine import StepSettings, TrainStep, distribute, train_one_epoch
from util.errors import UserError
from util.nonfinite import NonFiniteGuard
from util.optim import StepSchedule
from util.train_state import TrainState

CPU = torch.device("cpu")


# what launchers say


def test_without_a_launcher_there_is_one_process():
    assert read_launch({}) is None
    assert dist.world_size() == 1 and dist.is_main()


def test_torchrun_is_read_from_the_environment():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert read_launch(env, local_rank_flag=0) == Launch(3, 4, 1, {})


def test_the_local_rank_flag_counts_when_the_environment_has_none():
    assert read_launch({"RANK": "3", "WORLD_SIZE": "4"}, local_rank_flag=1) == Launch(3, 4, 1, {})
    assert read_launch({"RANK": "3", "WORLD_SIZE": "4"}) == Launch(3, 4, None, {})


SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "1234567",
}


def test_a_slurm_step_gives_rank_local_rank_and_a_port_of_its_own():
    launch = read_launch(SLURM)
    assert (launch.rank, launch.world_size, launch.local_rank) == (5, 8, 1)
    assert launch.master == {"MASTER_ADDR": "gpu003", "MASTER_PORT": str(20000 + 1234567 % 20000)}


@pytest.mark.parametrize(
    "change",
    [{"SLURM_STEP_ID": None}, {"SLURM_NTASKS": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}],
    ids=["batch script", "one task", "interactive step"],
)
def test_a_slurm_shell_is_one_process(change):
    env = {name: value for name, value in (SLURM | change).items() if value is not None}
    assert read_launch(env) is None


def test_the_environment_of_torchrun_wins_over_slurm():
    assert read_launch(SLURM | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}).world_size == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node7", "node7"), ("a1,a2", "a1"), ("gpu[003-007,12],login", "gpu003"), ("n[5,9]-ib", "n5-ib")],
)
def test_the_first_machine_of_a_slurm_list_is_the_master(nodes, host):
    assert first_host(nodes) == host


def test_a_launch_without_a_master_is_refused(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not: start with torchrun"):
        dist.init_distributed_mode("cpu", None, 1)


@pytest.mark.parametrize(("gpus", "local_rank", "local_size"), [(0, 3, 4), (2, 1, 2), (8, 3, 4)])
def test_without_a_word_of_the_launcher_every_gpu_of_a_machine_has_a_process(monkeypatch, gpus, local_rank, local_size):
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is restored; the call sets it
        monkeypatch.delenv(name)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    dist.init_distributed_mode("cpu", None, 1)
    monkeypatch.setattr(dist, "is_distributed", lambda: True)
    monkeypatch.setattr(dist, "world_size", lambda: 4)
    assert (dist.local_rank(), dist.local_world_size()) == (local_rank, local_size)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_told():
    with pytest.raises(UserError, match="--device cuda: PyTorch sees no GPU"):
        dist.init_distributed_mode("cuda", None, 1)


def test_a_single_process_makes_the_gpu_that_was_asked_for_its_current_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert dist.init_distributed_mode("cuda:1", None, 1) == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


# two processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(rank: int, port: int, work: Callable, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    try:
        work(rank, folder)
    finally:
        torch.distributed.destroy_process_group()


def in_two_processes(work: Callable, folder) -> list:
    """Run `work(rank, folder)` in two processes; return what each saved as `{rank}.pth`."""
    torch.multiprocessing.spawn(_enter, args=(free_port(), work, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def halves() -> tuple[list, list]:
    """Return two one-image batches, the second without any object."""
    batches = []
    for i, target in enumerate(tiny_targets()):
        images = tiny_images(((64, 64), (64, 64)))
        one = replace(images, pixels=images.pixels[i : i + 1], padding=images.padding[i : i + 1], sizes=[(64, 64)])
        batches.append((one, [target]))
    return batches


def both() -> tuple:
    return tiny_images(((64, 64), (64, 64))), tiny_targets()


def step_of(flag: str) -> TrainStep:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(f"--num_feature_levels 3 {flag}"))
    return TrainStep(model, criterion).train()


def gradients(step: TrainStep) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in step.named_parameters() if p.requires_grad}


BRANCH = "--with_box_refine --two_stage --num_queries_one2many 6 --k_one2many 2"
SCHEMES = [
    "",
    f"{BRANCH} --mixed_selection",
    f"{BRANCH} --one2many_proposals own --hybrid layer --hybrid_k 2 --hybrid_layers 1",
    f"{BRANCH} --one2many_own encoder --one2many_groups isolated --hybrid epoch --hybrid_k 2",
]


def _backward(rank: int, folder: str) -> None:
    for i, flag in enumerate(SCHEMES):
        step = step_of(flag)
        wrapped = distribute(step, CPU)
        images, targets = halves()[rank]
        wrapped(images, targets, 0).total.backward()
        torch.save(gradients(step), f"{folder}/{rank}_{i}.pth")
    torch.save({}, f"{folder}/{rank}.pth")


def test_gradients_of_two_processes_equal_those_of_one_with_both_halves(tmp_path):
    in_two_processes(_backward, tmp_path)
    for i, flag in enumerate(SCHEMES):
        step = step_of(flag)
        step(*both(), 0).total.backward()
        parts = [torch.load(tmp_path / f"{rank}_{i}.pth") for rank in range(2)]
        for name, expected in gradients(step).items():
            for part in parts:
                assert part[name] is not None, f"{name} has no gradient"
                torch.testing.assert_close(
                    part[name], expected, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
                )


def state_of(step: TrainStep) -> TrainState:
    optimizer = torch.optim.SGD([p for p in step.parameters() if p.requires_grad], lr=0.01)
    return TrainState(
        model=step.model,
        criterion=step.criterion,
        optimizer=optimizer,
        schedule=StepSchedule(optimizer, []),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        ema=None,
        args={},
        class_names=["a"],
        category_ids=[1],
    )


def _running_mean(rank: int, folder: str) -> None:
    norm = torch.nn.BatchNorm2d(1)
    norm.running_mean.fill_(rank + 5)
    dist.broadcast_buffers(norm)
    torch.save(norm.running_mean.item(), f"{folder}/{rank}.pth")


def test_all_processes_evaluate_the_running_statistics_of_the_main_one(tmp_path):
    assert in_two_processes(_running_mean, tmp_path) == [5, 5]


def _accumulate(rank: int, folder: str) -> None:
    step = step_of("")
    state = state_of(step)
    batches = [halves()[rank], halves()[1 - rank]]
    settings = StepSettings(grad_accum_steps=2)
    train_one_epoch(distribute(step, CPU), batches, state, settings, NonFiniteGuard(None, 9), CPU)
    torch.save(step.model.state_dict(), f"{folder}/{rank}.pth")


def test_accumulation_over_two_processes_keeps_their_weights_equal(tmp_path):
    one, other = in_two_processes(_accumulate, tmp_path)
    start_weights = step_of("").model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["input_proj.0.0.weight"], start_weights["input_proj.0.0.weight"])


def _one_bad(rank: int, folder: str, deferred: bool = False) -> None:
    step = step_of("")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    bad = make_target([[0.5, 0.5, float("nan"), 0.2]], [0], image_id=13)
    batches = [(halves()[0][0], [bad] if rank == 1 else halves()[0][1])]
    guard = NonFiniteGuard(None, 9, deferred=deferred)
    wrapped, state = distribute(step, CPU), state_of(step)
    if deferred:
        state.optimizer = torch.optim.AdamW(state.optimizer.param_groups[0]["params"], fused=True)
    train_one_epoch(wrapped, batches, state, StepSettings(), guard, CPU)
    after = step.model.state_dict()
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    state.finish_epoch({})
    train_one_epoch(wrapped, [halves()[rank]], state, StepSettings(), guard, CPU)
    moved = not torch.equal(before["input_proj.0.0.weight"], step.model.state_dict()["input_proj.0.0.weight"])
    torch.save({"unchanged": unchanged, "moved": moved}, f"{folder}/{rank}.pth")


def _one_bad_deferred(rank: int, folder: str) -> None:
    _one_bad(rank, folder, deferred=True)


@pytest.mark.parametrize("case", [_one_bad, _one_bad_deferred])
def test_a_bad_loss_in_one_process_skips_the_step_in_all_and_training_goes_on(case, tmp_path):
    assert in_two_processes(case, tmp_path) == [{"unchanged": True, "moved": True}] * 2


# the command line

LAUNCH = ["-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_both_launchers_train_two_processes_and_resume_exactly(tmp_path):
    more = "--epochs 2 --dropout 0.1 --lr_drop 2"
    text = finish(start([*TORCHRUN, "main.py", *flags(tmp_path / "whole", more)]))
    assert "2 process(es)" in text and "batch 4 = 2 process(es) x 2 x 1" in text, text
    text = finish(start([*LAUNCH, "main.py", *flags(tmp_path / "parts", f"{more} --epochs 1")]))
    assert "outputs are in" in text, text
    text = finish(start([*TORCHRUN, "main.py", *flags(tmp_path / "parts", f"{more} --resume auto")]))
    assert "Epoch: [1] [1/4]" in text, text
    whole, parts = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert len(whole["rng"]) == 2
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    entries = [json.loads(line) for line in (tmp_path / "parts" / "log.txt").read_text().splitlines()]
    assert [(entry["epoch"], entry["test_images"]) for entry in entries] == [(0, 5), (1, 5)]  # 3 + 2 images
    assert run(tmp_path / "alone", f"{more} --eval --resume {tmp_path}/parts/checkpoint.pth") == 0
    merged, alone = (json.loads((tmp_path / name / "eval/results.json").read_text()) for name in ("parts", "alone"))
    assert len(alone) == 5 * 48  # images x (queries x classes)
    assert merged == alone
