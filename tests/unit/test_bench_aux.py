"""The benchmark of auxiliary heads: its columns, its counts, its tables, and where a step waits for the device."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.aux_heads.rpn import _survivors_at_once
from ops.assignment import gpu_solver_ready
from tests.tiny import TINY, TWO_STAGE, tiny_args
from tests.waits import Waits
from util import bench_aux
from util.bench_aux import NONE, ONE, SILENT, TWO, breakdown, kept_memory, main, variants
from util.bench_common import Form, model_forms, random_images, random_targets, total_loss

TRICKS = f"{TWO_STAGE} --mixed_selection --look_forward_twice"
SMALL = f"{TINY} --roi_samples 16 --device cpu --image_size 64 64 --objects 3 --repeats 1 --warmup 0"


def test_columns_differ_in_their_heads_only() -> None:
    columns = variants(tiny_args("--lambda1 0.5"), [["gfl", "atss", "atss"]])
    found = {name: (args.aux_heads, args.lambda1) for name, args in columns.items()}
    assert found == {
        "K = 0": ([], 0.5),
        "K = 1": (["atss"], 0.5),
        "K = 2": (["atss", "faster_rcnn"], 0.5),
        "K = 2 without queries": (["atss", "faster_rcnn"], 0.0),
        "K = 3 (gfl atss atss)": (["gfl", "atss", "atss"], 0.5),
    }
    assert len({str({**vars(args), "aux_heads": 0, "lambda1": 0}) for args in columns.values()}) == 1


def test_what_the_backward_pass_finds_is_counted_once() -> None:
    weight = torch.ones(10, requires_grad=True)
    inputs = torch.arange(10.0)

    def forward() -> Tensor:
        return (weight * inputs).exp()  # keeps its inputs for the weight, and its result; the weight is not asked for

    def halves(x: Tensor) -> Tensor:
        return (x[:5] * x[5:]).sum()  # keeps two views of a tensor that is kept already

    form = Form("by hand", forward, halves, [weight], lambda: None)
    assert kept_memory(form) == {"kept": 80, "parameters": 40, "gradients": 40, "all": 160}
    assert weight.grad is None


def test_the_breakdown_of_two_heads_is_made_of_differences() -> None:
    samples = {name: {"step": [0.0, ms, 99.0]} for name, ms in ((NONE, 10.0), (ONE, 13.0), (TWO, 25.0), (SILENT, 18.0))}
    memory = {name: {"all": n * 2**20} for name, n in ((NONE, 100), (ONE, 104), (TWO, 200), (SILENT, 150))}
    found = breakdown(samples, memory)
    assert list(found["ms"].values()) == [10, 8, 7, 25]
    assert list(found["MiB"].values()) == [100, 50, 50, 200]
    assert "| heads and their assigners | 8.0 (0.32) | 50.0 (0.25) |" in bench_aux.breakdown_table(found)


def test_the_command_line_prints_tables_and_writes_every_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(f"{SMALL} {TRICKS} --aux_heads fcos --output_dir {tmp_path}".split()) == 0
    printed = capsys.readouterr().out
    columns = "K = 0 | K = 1 | K = 2 | K = 2 without queries | K = 1 (fcos) |"
    report = (tmp_path / "bench_aux.md").read_text()
    assert report in printed and printed.endswith(f"and {tmp_path / 'bench_aux.json'}\n")
    assert f"| ms | {columns}" in report and f"| MiB | {columns}" in report and "| K = 2 | ms | MiB |" in report
    assert "2 images 64x64 with 3 objects each, 8 queries" in report
    numbers = json.loads((tmp_path / "bench_aux.json").read_text())
    for ms in numbers["ms"].values():
        assert all(len(samples) == 1 for samples in ms.values())
        for part in ("forward", "criterion", "backward", "update"):
            assert all(0 < inner < whole for inner, whole in zip(ms[part], ms["step"]))
    for part in ("kept", "parameters", "gradients", "all"):
        sizes = {name: of[part] for name, of in numbers["bytes"].items()}
        assert 0 < sizes[NONE] < sizes[ONE] < sizes[TWO] and sizes[NONE] < sizes[SILENT] < sizes[TWO], part
        assert f"| {bench_aux.MEMORY[part]} | {sizes[NONE] / 2**20:.2f} (1.00) |" in report
    assert numbers["benchmark"]["image_size"] == [64, 64]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lambda1 0", "the queries of the heads are measured here"),
        ("--num_feature_levels 3 --repeats 0", "--repeats 0: must be at least 1"),
        ("--image_size 0 64", "must be at least 1"),
        ("--amp fp16", "use --amp bf16"),
        ("--use_checkpoint", "cannot be counted"),
        ("--mixed_selection --no-two_stage", "--mixed_selection needs --two_stage"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_way_out(flags: str, message: str, capsys) -> None:
    assert main(f"{SMALL} {flags}".split()) == 2
    assert message in capsys.readouterr().err


HEADS = {NONE: "", ONE: "--aux_heads atss", TWO: "--aux_heads atss faster_rcnn"}
WAITS = {NONE: {"cpu": 1}, ONE: {"cpu": 1, "tolist": 1}, TWO: {"cpu": 1, "tolist": 1, "nms": 1}}


def a_step(heads: str, device: str) -> Form:
    args = tiny_args(f"{TRICKS} {heads}")
    return model_forms(
        args, random_images(2, (96, 96), device), random_targets([3, 2], 4, device), {heads: total_loss}
    )[0]


@pytest.mark.parametrize("column", HEADS)
def test_a_step_waits_for_the_device_where_the_benchmark_says(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.aux_heads.rpn._survivors", _survivors_at_once)  # what a GPU takes
    form, copies = a_step(HEADS[column], "cpu"), Counter()

    def counted(name: str) -> None:
        original = getattr(Tensor, name)

        def method(*args):
            copies[name] += 1
            return original(*args)

        monkeypatch.setattr(Tensor, name, method)

    for name in ("cpu", "tolist"):  # no operators: they do not pass through `Waits`
        counted(name)
    with Waits() as waits:
        form.loss(form.forward()).backward()
    assert waits.found + copies == WAITS[column]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("column", HEADS)
def test_a_step_on_a_gpu_waits_as_often(column: str) -> None:
    form = a_step(HEADS[column], "cuda")
    form.loss(form.forward()).backward()  # what is kept for later steps is made
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            form.loss(form.forward()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in found if "synchronizing" in str(w.message)]
    by_host = not gpu_solver_ready(torch.device("cuda"))  # the only `cpu`: the costs of the matching
    assert len(waits) == sum(count for name, count in WAITS[column].items() if name != "cpu" or by_host)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_peak_on_a_gpu_grows_with_the_heads(tmp_path: Path) -> None:
    assert main(f"{SMALL} {TRICKS} --device cuda --output_dir {tmp_path}".split()) == 0
    peaks = {name: of["all"] for name, of in json.loads((tmp_path / "bench_aux.json").read_text())["bytes"].items()}
    assert 0 < peaks[NONE] < peaks[ONE] < peaks[TWO]
