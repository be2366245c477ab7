"""Whole training steps of presets: images/s, peak memory and where the time goes.

python util/benchmark.py step                                          five presets, one after the other in every round
python util/benchmark.py step --presets configs/h_detr/hybrid_r50_12ep.sh --size 800 1333 --batch_size 2 --amp bf16
python util/benchmark.py step --compare "|--compile|--channels_last"     every preset in three ways

Random images without padding, random objects; the optimiser runs with rates of 0. A row is a preset, its ratio is to
the first one. The share of deformable attention is that of its operator, forward and backward, in a profiled step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ops.benchmark_record import record, shortened, spread
from util.arg_rules import check_args
from util.args import get_args_parser
from util.bench_aux import build_forms, one_step
from util.bench_common import Form, add_flags, check_least, check_output, markdown_table, measure, medians, ratio, start
from util.environment import environment
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PRESETS = [
    "configs/deformable_detr/two_stage.sh",
    "configs/h_detr/tricks_r50_12ep.sh",
    "configs/h_detr/hybrid_r50_12ep.sh",
    "configs/dab_dino/dino_4scale_r50_12ep.sh",
    "configs/co_detr/k2_r50_12ep.sh",
]
SHOWN = {"forward": "forward", "criterion": "losses", "matching": "of it matching", "backward": "backward"}
SHOWN |= {"update": "optimiser"}
# Deformable attention in a profile: the operators, those of the compiled library that they call, and CUDA kernels.
ATTENTION = re.compile(r"ms_deform_attn|assigndetr_ext::(forward|backward)|assigndetr::(fast_|generic_|fixed_)")


def preset_flags(preset: str) -> list[str]:
    """Return the flags of a preset; UserError if there is no such file."""
    path = Path(preset) if Path(preset).is_file() else ROOT / preset
    if not path.is_file():
        raise UserError(f"--presets {preset}: there is no such file")
    environ = {**os.environ, "LAUNCH": r"printf %s\n"}
    done = subprocess.run(["sh", str(path)], env=environ, capture_output=True, text=True)
    words = done.stdout.splitlines()
    if done.returncode or "main.py" not in words:
        raise UserError(f"--presets {preset} does not start main.py: {done.stderr.strip() or done.stdout.strip()}")
    return words[words.index("main.py") + 1 :]


def rows_of(own: Namespace, rest: Sequence[str]) -> dict[str, Namespace]:
    """Return the arguments of every row by name; `rest` are flags of main.py that win over the presets."""
    parser, rows = get_args_parser(), {}
    for preset in own.presets:
        for way in own.compare.split("|"):
            name = " ".join([Path(preset).stem, *shlex.split(way)])
            plain = ["--backbone_weights", "none", "--output_dir", "", "--num_classes", "91"]
            args = parser.parse_args([*preset_flags(preset), *plain, *rest, *shlex.split(way)])
            check_args(args)
            if name in rows:
                raise UserError(f"--presets: two are called {name}; measure them one after the other")
            rows[name] = args
    return rows


def attention_share(form: Form, device: torch.device) -> float:
    """Return the share of deformable attention's operator in one step, forward and backward; 0 if nothing was timed."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as found:
        one_step(form)
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    whole, own = 0.0, 0.0
    for event in found.key_averages():
        whole += getattr(event, key)
        own += getattr(event, key) * bool(ATTENTION.search(event.key))
    return own / whole if whole else 0.0


def table(entries: dict[str, dict[str, Any]], batch: int) -> str:
    """Return a markdown table, one row per entry."""
    head = ["preset", "images/s", "ms a step (range)", "against the first", *SHOWN.values(), "attention", "memory, GiB"]
    first = next(iter(entries.values()))["ms"]["step"]
    rows = [head]
    for name, entry in entries.items():
        ms, low_high = entry["ms"], entry["range"]
        shares = [f"{ms[part] / ms['step']:.0%}" for part in SHOWN]
        rows.append(
            [
                name,
                f"{1000 * batch / ms['step']:.2f}",
                f"{ms['step']:.0f} ({low_high[0]:.0f} to {low_high[1]:.0f})",
                ratio(ms["step"], first),
                *shares,
                f"{entry['attention']:.0%}",
                f"{entry['memory'] / 2**30:.2f}",
            ]
        )
    return markdown_table(rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not main.py's."""
    parser = argparse.ArgumentParser(
        "python util/benchmark.py step",
        description=__doc__.split("\n\n")[0],
        epilog="All other flags are main.py's and win over the presets: --batch_size, --amp, --backbone, ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(
        parser,
        ("--presets", {"nargs": "+"}, PRESETS, "shell files of configs/"),
        ("--compare", {}, "", "ways to measure every preset: flags of main.py, | between ways"),
        ("--size", {"nargs": 2, "type": int}, [320, 320], "height and width of the images"),
        ("--objects", {"type": int}, 7, "per image"),
        ("--repeats", {"type": int}, 5, "measured steps of each; their median is shown"),
        ("--warmup", {"type": int}, 1, "steps of each before them"),
        ("--threads", {"type": int}, 0, "threads of PyTorch on the CPU; 0: its own choice"),
        ("--output", {}, "", "JSON file for all numbers; empty: save nothing"),
    )
    return parser


def run(own: Namespace, rest: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Measure, print and return one entry per row."""
    check_least(own, {"repeats": 1, "warmup": 0, "threads": 0, "objects": 0, "size": 32})
    rows = rows_of(own, rest)
    args = next(iter(rows.values()))
    if len({row.batch_size for row in rows.values()}) > 1:
        raise UserError("the presets have different batches: give one --batch_size for all")
    device = start(args, own.threads)
    forms, memory = build_forms(rows, size=tuple(own.size), objects=own.objects, device=device)
    samples = measure(forms, device, repeats=own.repeats, warmup=own.warmup)
    found = medians(samples, [*SHOWN, "step"])
    entries = {
        form.name: {
            "ms": found[form.name],
            "range": [min(samples[form.name]["step"]), max(samples[form.name]["step"])],
            "spread": {part: spread(values) for part, values in samples[form.name].items()},
            "memory": memory[form.name]["all"],
            "attention": attention_share(form, device),
            "batch": args.batch_size,
            "device": device.type,
        }
        for form in forms
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
    print(
        f"{device}, {where}, torch {torch.__version__}; batch {args.batch_size} of {own.size[0]} x {own.size[1]}, "
        f"{own.objects} objects each; medians of {own.repeats}\n\n{table(entries, args.batch_size)}"
    )
    if device.type == "cpu":
        print("\nmemory: tensors kept for the backward pass, parameters and gradients; the optimiser is not in it")
    return entries


def figures(entries: dict[str, dict[str, Any]], own: Namespace) -> list[dict[str, Any]]:
    """Return one entry per row: medians of the parts and median and range of the step in ms, memory in bytes."""
    names = [(preset, way) for preset in own.presets for way in own.compare.split("|")]
    sizes = {"size": own.size, "objects": own.objects, "repeats": own.repeats, "threads": torch.get_num_threads()}
    found = []
    for (preset, way), entry in zip(names, entries.values(), strict=True):
        case = {"preset": preset.removeprefix("configs/"), "way": " ".join(shlex.split(way)), **sizes}
        case |= {"batch": entry["batch"], "device": entry["device"]}
        ms = {part: shortened(entry["ms"][part]) for part in SHOWN}
        step = {"step": entry["spread"]["step"], "ms": ms, "memory": entry["memory"]}
        found.append({"kind": "step", "case": case, **step, "attention": shortened(entry["attention"])})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 2 after a mistake of the user."""
    (own, rest), facts = get_parser().parse_known_args(argv), record()
    try:
        check_output(own.output)
        entries = run(own, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        content = {**facts, "environment": environment(), "benchmark": vars(own), "flags": list(rest)}
        content |= {"figures": figures(entries, own), "results": entries}
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall numbers are in {own.output}" if own.output else "\nnothing was saved: there is no --output")
    return 0
