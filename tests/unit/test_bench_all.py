"""All benchmarks in a row: their commands exist, a failure stops nobody, and a run that was cut off goes on."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from ops import benchmark as operator_benchmark
from util import bench_all, bench_train
from util.args import get_args_parser
from util.bench_all import BY_DEVICE, ROOT, Benchmark, commands, main
from util.benchmark import BENCHMARKS
from util.benchmark import main as benchmark

FIGURE = {"kind": "loader", "case": {"data": ""}, "plain": [2, 1, 3], "ours": [1, 1, 1], "times_as_fast": [2, 1, 3]}
# Counts how often it ran, writes what it is told and ends as it is told.
FAKE = """
import json, sys
from pathlib import Path
count, content, status, flag, output = sys.argv[1:]
with Path(count).open("a") as file:
    file.write("x")
print("measuring")
if content:
    Path(output).write_text(content)
if status == "1":
    raise ImportError("No module named 'pycocotools'")
sys.exit(int(status))
"""


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Benchmark]:
    """Return benchmarks that do nothing: one that works, and five that fail in five ways."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    content = {"date": "2026-01-02", "machine": {}, "versions": {}, "figures": [FIGURE], "samples": [1, 2, 3]}
    cases = {
        "missing": ("", 1),
        "good": (json.dumps(content), 0),
        "fails": (json.dumps(content), 3),
        "silent": ("", 0),
        "empty": (json.dumps(content | {"figures": []}), 0),
        "broken": ("{", 0),
    }
    return {
        name: Benchmark(0.1, shlex.join([str(fake), str(tmp_path / f"{name}.count"), text, str(status)]))
        for name, (text, status) in cases.items()
    }


@cache
def flags_of(preset: str) -> list[str]:
    """Return the flags of a preset; asking the shell once is enough."""
    return original_flags(preset)


original_flags = bench_train.preset_flags


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("device", BY_DEVICE)
def test_every_command_of_the_table_is_one_that_its_benchmark_accepts(device: str, quick: bool, monkeypatch) -> None:
    monkeypatch.setattr(bench_train, "preset_flags", flags_of)
    for name, (minutes, command) in commands(device, quick=quick).items():
        script, *words = [*shlex.split(command), "--output", "x.json"]
        assert minutes > 0 and (ROOT / script).is_file(), name
        if script == "ops/benchmark.py":
            assert operator_benchmark.parse(words).output == "x.json"
            continue
        assert script == "util/benchmark.py"
        module = import_module(BENCHMARKS[words[0]][0])
        own, rest = module.get_parser().parse_known_args(words[1:])
        assert own.output == "x.json", name
        if words[0] == "step":
            rows = bench_train.rows_of(own, rest)  # the flags of main.py, and what cannot be combined
            assert {row.device for row in rows.values()} == {device}
        elif words[0] == "loader":
            get_args_parser().parse_args(rest)
        else:
            assert not rest, name


def test_benchmarks_of_a_gpu_do_without_pycocotools() -> None:
    names = {shlex.split(own.command)[1] for own in commands("cuda").values() if own.command.startswith("util")}
    modules = ["ops.benchmark", "util.bench_all", *(BENCHMARKS[name][0] for name in sorted(names))]
    code = f"import sys; sys.modules['pycocotools'] = None; import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_list_for_a_processor_takes_less_than_25_minutes_and_the_one_for_a_gpu_less_than_20() -> None:
    assert sum(own.minutes for own in commands("cpu").values()) <= 25
    assert sum(own.minutes for own in commands("cuda").values()) <= 20


def test_a_failure_stops_no_other_and_is_named_at_the_end(table, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "out"
    assert main(["--output", str(folder)], table) == 1
    printed = capsys.readouterr().out
    assert "[6/6] broken" in printed and "FAILED, exit status 1: ImportError: No module named 'pycocotools'" in printed
    said = dict(line.removeprefix("failed: ").split(" (", 1) for line in printed.splitlines() if "failed: " in line)
    assert list(said) == ["missing", "fails", "silent", "empty", "broken"]
    assert said["fails"].startswith("exit status 3)") and said["silent"].startswith("it wrote no figures)")
    assert said["empty"].startswith("nothing was compared") and said["broken"].startswith("its figures cannot be read")
    assert sorted(path.name for path in folder.glob("*.json")) == ["good.json"]
    kept = json.loads((folder / "good.json").read_text())
    assert kept["figures"] == [FIGURE] and "samples" not in kept and kept["quick"] is False
    assert kept["command"] == f"python {table['good'].command}" and kept["name"] == "good"
    assert (folder / "good.txt").read_text().splitlines()[1] == "measuring"
    assert f"python util/benchmark.py readme {folder}" in printed


def test_what_is_done_is_left_out_until_it_is_asked_for_again_or_its_command_changes(table, tmp_path: Path) -> None:
    def runs() -> list[int]:
        counts = (tmp_path / f"{name}.count" for name in ("good", "fails"))
        return [len(path.read_text()) if path.exists() else 0 for path in counts]

    flags = ["--output", str(tmp_path / "out"), "--only", "good", "fails"]
    assert main(flags, table) == 1 and runs() == [1, 1]
    assert main(flags, table) == 1 and runs() == [1, 2]
    assert main([*flags[:-1]], table) == 0 and runs() == [1, 2]
    assert main([*flags[:-1], "--again"], table) == 0 and runs() == [2, 2]
    changed = {**table, "good": Benchmark(1, f"{table['good'].command} ")}
    assert main([*flags[:-1]], changed) == 0 and runs() == [3, 2]


def test_a_failure_leaves_no_figures_of_an_earlier_run(table, tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path), "--only", "fails"]
    (tmp_path / "fails.json").write_text("figures")
    assert main(flags, table) == 1 and not (tmp_path / "fails.json").exists()


def test_a_run_that_is_interrupted_says_that_it_can_go_on(table, tmp_path: Path, monkeypatch, capsys) -> None:
    flags = ["--output", str(tmp_path), "--only", "good"]
    with monkeypatch.context() as patched:
        patched.setattr(bench_all, "measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(flags, table) == 130
    assert "the same command line goes on from here" in capsys.readouterr().out
    assert main(flags, table) == 0


def test_the_list_shows_what_is_done_and_runs_nothing(table, tmp_path: Path, capsys) -> None:
    flags = ["--output", str(tmp_path / "out")]
    main([*flags, "--only", "good"], table)
    capsys.readouterr()
    assert main([*flags, "--list"], table) == 0
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows[:3] == [["| missing", "0.1", ""], ["| good", "0.1", "yes"], ["| fails", "0.1", ""]]
    assert not (tmp_path / "missing.count").exists()


def test_quick_figures_are_marked_and_do_not_count_as_done(table, tmp_path: Path) -> None:
    flags = ["--output", str(tmp_path / "out"), "--only", "good"]
    assert main([*flags, "--quick"], table) == 0
    assert json.loads((tmp_path / "out" / "good.json").read_text())["quick"] is True
    assert main(flags, table) == 0 and (tmp_path / "good.count").read_text() == "xx"
    assert json.loads((tmp_path / "out" / "good.json").read_text())["quick"] is False
    assert all(own.command != commands("cpu")[name].command for name, own in commands("cpu", quick=True).items())


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path, capsys) -> None:
    assert benchmark(["all", "--output", str(tmp_path), "--only", "lodaer"]) == 2
    assert "--only lodaer: --device cpu has operator, " in capsys.readouterr().err
