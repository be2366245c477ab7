"""The benchmark of whole steps: flags of presets, the table, and a run on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ops
from tests.tiny import TINY, TWO_STAGE
from util import bench_train, benchmark
from util.bench_train import PRESETS, get_parser, main, preset_flags, rows_of, table
from util.errors import UserError

SMALL = [*TINY.split(), *TWO_STAGE.split(), "--num_classes", "4", "--batch_size", "1"]


def test_flags_of_a_preset_are_those_that_it_starts_main_with() -> None:
    flags = preset_flags("configs/deformable_detr/two_stage.sh")
    assert "--two_stage" in flags and "--with_box_refine" in flags


def test_every_preset_can_be_measured_in_several_ways() -> None:
    own = get_parser().parse_args(["--compare", "|--amp bf16"])
    rows = rows_of(own, ["--batch_size", "1"])
    assert len(rows) == 2 * len(PRESETS)
    assert rows["two_stage --amp bf16"].amp == "bf16" and rows["two_stage"].amp == "off"
    assert rows["two_stage"].backbone_weights == "none"  # nothing is downloaded


@pytest.mark.parametrize(("preset", "message"), [("nothing.sh", "there is no such file")])
def test_a_preset_that_is_none_is_named(preset: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preset_flags(preset)


def test_the_table_gives_images_per_second_and_shares_of_the_step() -> None:
    ms = {"step": 500.0, "forward": 250.0, "criterion": 50.0, "matching": 5.0, "backward": 150.0, "update": 50.0}
    one = {"ms": ms, "range": [400.0, 600.0], "memory": 2**30, "attention": 0.25}
    slow = {**one, "ms": {name: 2 * value for name, value in ms.items()}}
    lines = table({"a": one, "b": slow}, batch=2).splitlines()
    assert lines[2] == "| a | 4.00 | 500 (400 to 600) | 1.00 | 50% | 10% | 1% | 30% | 10% | 25% | 1.00 |"
    assert lines[3].startswith("| b | 2.00 | 1000 (400 to 600) | 2.00 |")


@pytest.mark.parametrize("fused", [True, False])
def test_the_share_of_attention_is_that_of_the_compiled_code_too(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    if ops.active_backend("cpu") != "cpu":
        pytest.skip("no compiled kernel here")
    layer, query = ops.MSDeformAttn(64, 1, 8, 4), torch.zeros(1, 20000, 64)
    reference, memory = torch.rand(1, 20000, 1, 2), torch.zeros(1, 4, 64)

    def step(form) -> None:  # the rest are few linear layers
        for _ in range(2):
            layer(query, reference, memory, [(2, 2)]).sum().backward()

    monkeypatch.setattr(bench_train, "one_step", step)
    ops.set_fused(fused)
    try:
        assert bench_train.attention_share(None, torch.device("cpu")) > 0.1
        monkeypatch.setattr(bench_train, "one_step", lambda form: memory.square().sum())
        assert bench_train.attention_share(None, torch.device("cpu")) == 0
    finally:
        ops.set_fused(True)


def test_a_run_prints_and_saves_one_row_per_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    flags = ["--presets", PRESETS[0], "--compare", "|--no_aux_loss", "--size", "96", "96", "--repeats", "1"]
    assert benchmark.main(["step", *flags, "--warmup", "0", "--output", str(output), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "| two_stage |" in printed and "| two_stage --no_aux_loss |" in printed
    content = json.loads(output.read_text())
    results = content["results"]
    assert [figure["case"]["way"] for figure in content["figures"]] == ["", "--no_aux_loss"]
    for figure, entry in zip(content["figures"], results.values(), strict=True):
        assert figure["case"]["preset"] == "deformable_detr/two_stage.sh" and figure["case"]["batch"] == 1
        assert figure["step"] == pytest.approx([entry["ms"]["step"], *entry["range"]], rel=1e-3)
        assert 0 < figure["ms"]["forward"] < figure["step"][0] and figure["memory"] == entry["memory"]
    assert all(0 < entry["attention"] < 1 and entry["memory"] > 0 for entry in results.values())


def test_two_presets_of_one_name_are_refused(tmp_path: Path) -> None:
    twin = tmp_path / Path(PRESETS[0]).name
    twin.write_text("exec $LAUNCH main.py --two_stage --with_box_refine\n")
    own = get_parser().parse_args(["--presets", PRESETS[0], str(twin)])
    with pytest.raises(UserError, match="two are called two_stage"):
        rows_of(own, [])


def test_presets_with_different_batches_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--presets", PRESETS[0], "--compare", "|--batch_size 3"]) == 2
    assert "give one --batch_size for all" in capsys.readouterr().err
