"""Every benchmark that README.md quotes, one after the other, each in a process of its own.

python util/benchmark.py all --output configs/speed/cpu                   what a processor is asked
python util/benchmark.py all --output configs/speed/h200 --device cuda    what a GPU is asked
python util/benchmark.py all --output FOLDER --only matching loader       some of them
python util/benchmark.py all --output FOLDER --list                       their commands, minutes, and what is done

What a benchmark prints goes to FOLDER/NAME.txt, its figures to FOLDER/NAME.json: machine, versions, date, command,
medians and ranges. One whose FOLDER/NAME.json is from the same command is done, so the same command line continues a
run that was cut off; `--again` measures it anew. One that fails leaves its NAME.txt, and the others go on.

`python util/benchmark.py readme` writes the tables of README.md from such folders, one for each machine. The machine
should do nothing else meanwhile: figures with more than one thread, and on a GPU, are of the clock.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from util.bench_common import markdown_table
from util.environment import git_version, prepare_output_dir
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


class Benchmark(NamedTuple):
    """One process: about how many minutes it takes, and what Python is given."""

    minutes: float
    command: str


OPERATOR = "ops/benchmark.py --shapes enc800 dec900"
STEP = "util/benchmark.py step"
TWO_STAGE, HYBRID = "configs/deformable_detr/two_stage.sh", "configs/h_detr/hybrid_r50_12ep.sh"
CPU_WAYS = "|--compile|--channels_last"
GPU_WAYS = "--amp off|--amp bf16|--amp bf16 --channels_last|--amp bf16 --compile"

# Minutes on two cores of an AMD EPYC.
CPU = {
    "operator": Benchmark(3, f"{OPERATOR} --what operator --devices cpu --dtypes fp32 bf16 --threads 1 2"),
    "operator_uniform": Benchmark(
        3, f"{OPERATOR} --what operator --devices cpu --dtypes fp32 bf16 --threads 1 2 --dist uniform"
    ),
    "layer": Benchmark(1, f"{OPERATOR} --what layer --devices cpu --dtypes fp32 bf16 --threads 1 2"),
    "matching": Benchmark(3, "util/benchmark.py matching"),
    "loader": Benchmark(0.5, "util/benchmark.py loader"),
    "eval": Benchmark(1, "util/benchmark.py eval"),
    "step": Benchmark(2, f"{STEP} --device cpu --batch_size 1 --size 320 320 --repeats 3 --threads 2"),
    "step_800": Benchmark(
        4,
        f"{STEP} --presets {TWO_STAGE} {HYBRID} --device cpu --batch_size 1 --size 800 1333 --repeats 2 --threads 2",
    ),
    "step_ways": Benchmark(
        3,
        f"{STEP} --presets {TWO_STAGE} --compare '{CPU_WAYS}' --device cpu --batch_size 1 --size 320 320 --repeats 3 "
        "--threads 2",
    ),
}

# Minutes are guesses. Every preset is a process of its own: one that fails, or needs too much memory, is one failure.
GPU_PRESETS = {
    "two_stage": TWO_STAGE,
    "tricks": "configs/h_detr/tricks_r50_12ep.sh",
    "hybrid": HYBRID,
    "dino": "configs/dab_dino/dino_4scale_r50_12ep.sh",
    "co_detr": "configs/co_detr/k2_r50_12ep.sh",
}
GPU_OPERATOR = f"{OPERATOR} --devices cuda --dtypes fp32 bf16 fp16"
GPU_STEP = "--device cuda --size 800 1333 --repeats 10 --warmup 3"
CUDA = {
    "operator_b2": Benchmark(2, f"{GPU_OPERATOR} --what operator --batch 2"),
    "operator_b8": Benchmark(2, f"{GPU_OPERATOR} --what operator --batch 8"),
    "operator_uniform": Benchmark(1, f"{GPU_OPERATOR} --what operator --batch 2 --dist uniform"),
    "layer_b2": Benchmark(1, f"{GPU_OPERATOR} --what layer --batch 2"),
    "layer_b8": Benchmark(1, f"{GPU_OPERATOR} --what layer --batch 8"),
    "matching": Benchmark(2, "util/benchmark.py matching --device cuda --shapes trained --repeats 3"),
    **{
        f"step_b{batch}_{name}": Benchmark(0.7, f"{STEP} --presets {preset} {GPU_STEP} --amp bf16 --batch_size {batch}")
        for batch in (2, 8)
        for name, preset in GPU_PRESETS.items()
    },
    "step_ways": Benchmark(2, f"{STEP} --presets {TWO_STAGE} {GPU_STEP} --compare '{GPU_WAYS}' --batch_size 2"),
}
BY_DEVICE = {"cpu": CPU, "cuda": CUDA}

# Flags that follow the others and win, by the first part of the name.
QUICK = {
    "operator": "--shapes dec300 --dtypes fp32 --threads 1 --repeats 1",
    "layer": "--shapes dec300 --dtypes fp32 --threads 1 --repeats 1",
    "matching": "--queries 300 --batch_size 2 --layers 2 --repeats 1",
    "loader": "--images 2 --repeats 1 --test_size 64 --augment none",
    "eval": "--images 5 --detections 10 --classes 4 --repeats 1",
    "step": "--compare '' --size 96 96 --repeats 1 --warmup 0 --batch_size 1 --backbone resnet18 --hidden_dim 64 "
    "--nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 48 --num_queries 20",
}


def commands(device: str, *, quick: bool = False) -> dict[str, Benchmark]:
    """Return the benchmarks of "cpu" or "cuda" by name; `quick` ones measure next to nothing, and show that all run."""
    table = BY_DEVICE[device]
    if not quick:
        return table
    return {name: Benchmark(0.2, f"{own.command} {QUICK[name.split('_')[0]]}") for name, own in table.items()}


def is_done(file: Path, command: str, quick: bool) -> bool:
    """Return whether `file` holds the figures of this very command, from a `quick` run or from a whole one."""
    try:
        content = json.loads(file.read_text())
        return (content["command"], content["quick"]) == (f"python {command}", quick)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def digest(content: Mapping[str, Any], **more: Any) -> str:
    """Return what is kept of a benchmark's JSON file, one figure in a line.

    Raises:
        KeyError: something is missing.
    """
    kept = more | {key: content[key] for key in ("date", "machine", "versions")}
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in kept.items()]
    figures = ",\n".join(f"  {json.dumps(figure)}" for figure in content["figures"])
    return "\n".join(["{", *lines, f' "figures": [\n{figures}\n ]', "}"]) + "\n"


def measure(name: str, command: str, folder: Path, **more: Any) -> str:
    """Run one benchmark and write its two files; return what went wrong, "" if nothing did."""
    raw, final = folder / f"{name}.part", folder / f"{name}.json"
    for stale in (raw, final):
        stale.unlink(missing_ok=True)
    begin = perf_counter()
    with (folder / f"{name}.txt").open("w") as file:
        print(f"$ python {command}", file=file, flush=True)
        words = [sys.executable, *shlex.split(command), "--output", str(raw)]
        status = subprocess.run(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    try:
        if status:
            return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        content = json.loads(raw.read_text())
        if not content["figures"]:
            return "nothing was compared: what is compared does not run here"
        about = {"name": name, "command": f"python {command}", **more}
        final.write_text(digest(content, **about, seconds=round(perf_counter() - begin)))
        return ""
    except OSError:
        return "it wrote no figures"
    except (KeyError, ValueError) as error:
        return f"its figures cannot be read: {error!r}"
    finally:
        raw.unlink(missing_ok=True)


def last_line(file: Path) -> str:
    """Return the last line of a text that is not empty, which of a failure is mostly the reason."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def get_parser() -> argparse.ArgumentParser:
    """Return the flags of this command."""
    parser = argparse.ArgumentParser(prog="util/benchmark.py all", description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="", help="folder for all files, one folder for each machine")
    parser.add_argument("--device", default="cpu", choices=list(BY_DEVICE), help="which list of benchmarks")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that all run; not for README.md")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    return parser


def chosen(own: Namespace, table: Mapping[str, Benchmark]) -> dict[str, Benchmark]:
    """Return the benchmarks of the command line.

    Raises:
        UserError: a name that is not in the table.
    """
    if unknown := [name for name in own.only if name not in table]:
        raise UserError(f"--only {' '.join(unknown)}: --device {own.device} has {', '.join(table)}")
    return {name: entry for name, entry in table.items() if not own.only or name in own.only}


def run(own: Namespace, table: Mapping[str, Benchmark], folder: Path) -> dict[str, str]:
    """Measure what is not done; return the reasons of those that failed by name."""
    left = {n: b for n, b in table.items() if own.again or not is_done(folder / f"{n}.json", b.command, own.quick)}
    minutes = sum(entry.minutes for entry in left.values())
    print(f"{len(table)} benchmarks, {len(table) - len(left)} of them done already; about {minutes:.0f} minutes")
    failed, commit, begin = {}, git_version(), perf_counter()
    for number, (name, (expected, command)) in enumerate(left.items(), start=1):
        print(f"[{number}/{len(left)}] {name}, about {expected:g} min: python {command}", flush=True)
        start = perf_counter()
        reason = measure(name, command, folder, device=own.device, quick=own.quick, git=commit)
        if reason:
            failed[name] = reason
            reason = f"FAILED, {reason}: {last_line(folder / f'{name}.txt')}; "
        now = perf_counter()
        print(f"    {reason or 'done, '}{now - start:.0f} s; {(now - begin) / 60:.1f} min so far", flush=True)
    return failed


def main(argv: Sequence[str] | None = None, table: Mapping[str, Benchmark] | None = None) -> int:
    """Run the command line; return 0, 1 if a benchmark failed, 2 after a mistake of the user, 130 if it was cut off.

    Args:
        table: benchmarks other than those of `commands`.
    """
    own = get_parser().parse_args(argv)
    try:
        if not own.output and not own.list:
            raise UserError("--output is missing: give a folder for this machine, such as configs/speed/cpu")
        table = chosen(own, commands(own.device, quick=own.quick) if table is None else table)
        folder = Path(own.output) if own.list else prepare_output_dir(own.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.list:
        rows = [["name", "minutes", "done", "command"]]
        for name, (minutes, command) in table.items():
            done = "yes" if is_done(folder / f"{name}.json", command, own.quick) else ""
            rows.append([name, f"{minutes:g}", done, f"`python {command}`"])
        print(markdown_table(rows))
        return 0
    try:
        failed = run(own, table, folder.resolve())
    except KeyboardInterrupt:
        print("\ncut off; the same command line goes on from here")
        return 130
    for name, reason in failed.items():
        print(f"failed: {name} ({reason}), see {folder / name}.txt")
    print(f"everything is in {folder}; the README is written by: python util/benchmark.py readme {own.output}")
    return 1 if failed else 0
