"""Time of matching and of the losses by matcher, for many numbers of queries and objects.

python -m util.bench_match                          on random predictions: 100 to 1800 queries, 5 to 200 objects
python -m util.bench_match --matchers hungarian soft soft-rounds --batches 2 16 --output times.json
python -m util.bench_match --whole --queries 300    whole steps of a model on random images
python -m util.bench_match --key_box --scg_rho 0.3  any flag of main.py describes another matcher or model

`match_ms` reaches from predictions and objects on the device to weighted pairs; of the learned matchers it holds the
probe and its loss. `loss_ms` is the rest of the criterion with the backward pass, through the probe too. Both are wall
clock between two waits for the device; on a GPU also the time between CUDA events around the region, which holds what
the device waits for the host. `--clock cpu` counts the processor time of this process instead: on one thread the same,
but other programs on a busy machine do not disturb it. Schedules of the matchers are at their end. All matchers take
turns in every repetition, on the same inputs; shown are the median and, in brackets, the 90th percentile.

`hungarian` computes the costs of all layers and images at once and solves all problems where the costs are.
`hungarian-published` is the way of DETR and Deformable-DETR: layer by layer, the queries of all images against the
objects of all images, a copy, the solver image by image. It is here as a baseline only. Both must pay the same for
their pairs, which is checked before anything is timed (exit status 1 if not).
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from models import num_classes
from ops.benchmark_record import record
from util.arg_rules import check_args
from util.args import get_args_parser
from util.bench_common import (
    PARTS,
    Form,
    Samples,
    add_flags,
    check_least,
    markdown_table,
    measure,
    medians,
    model_forms,
    random_images,
    random_targets,
    ratio,
    start,
    total_loss,
    with_ratio,
)
from util.bench_matchers import (
    CLOCKS,
    GREEDY,
    MATCHERS,
    OURS,
    PUBLISHED,
    REGIONS,
    SAME,
    SOFT,
    args_of,
    compare,
    contenders,
    make_inputs,
    measure_regions,
    published_loss,
)
from util.environment import environment
from util.errors import UserError
from util.rng import seed_everything
from util.structures import ImageBatch, Target

MODEL = "--backbone_weights none --with_box_refine --dropout 0"
GRID = {"queries": [100, 300, 900, 1800], "objects": [5, 20, 60, 200]}
ONE_CELL = {"queries": [300], "objects": [20], "batches": [2]}  # of --whole
ON_GPU = {"batches": [2, 16], "repeats": 200, "warmup": 20}
ON_CPU = {"batches": [2], "repeats": 10, "warmup": 2}
CLAIM = {"queries": 300, "layers": 6, "share": 0.5}  # of the paper, as far as it is on record: less than half the time


def table(entries: Sequence[dict[str, Any]], region: str) -> str:
    """Return a markdown table of one region: rows are the cells of the grid, columns the matchers."""
    names = list(entries[0]["ms"])
    compared = SOFT in names and OURS in names
    rows = [["N", "M", *names, *(["soft / hungarian"] if compared else [])]]
    for entry in entries:
        middle = {name: median(own[region]) for name, own in entry["ms"].items()}
        cells = [f"{middle[name]:.2f} ({np.percentile(entry['ms'][name][region], 90):.2f})" for name in names]
        last = [ratio(middle[SOFT], middle[OURS])] if compared else []
        rows.append([str(entry["queries"]), str(entry["objects"]), *cells, *last])
    return markdown_table(rows)


def claim(entries: Sequence[dict[str, Any]], base: str, layers: int) -> str:
    """Return a line that says where `soft` takes less than half the time of `base`, and how far it is from that."""
    share = CLAIM["share"]
    line = f"match_ms(soft) < {share} x match_ms({base}) at N = {CLAIM['queries']}, {CLAIM['layers']} layers: "
    cells = [e for e in entries if e["queries"] == CLAIM["queries"] and {SOFT, base} <= set(e["ms"])]
    if not cells or layers != CLAIM["layers"]:
        return line + f"not measured (needs --queries 300 --dec_layers 6 --matchers {base} soft)"
    verdicts = []
    for entry in cells:
        found = median(entry["ms"][SOFT]["match_ms"]) / median(entry["ms"][base]["match_ms"])
        verdict = "holds" if found < share else f"fails, {found / share:.1f} times too long"
        verdicts.append(f"batch {entry['batch']}, M = {entry['objects']}: {found:.2f} {verdict}")
    holds = sum(verdict.endswith("holds") for verdict in verdicts)
    return f"{line}holds in {holds} of {len(cells)} cells ({'; '.join(verdicts)})"


def savings(entries: Sequence[dict[str, Any]]) -> str:
    """Return a line that says how much of the published form's time is saved without any new idea of matching."""
    cells = [e for e in entries if e["queries"] == CLAIM["queries"] and {PUBLISHED, OURS} <= set(e["ms"])]
    if not cells:
        return ""
    parts = []
    for entry in cells:
        middle = {name: median(own["match_ms"]) for name, own in entry["ms"].items()}
        shares = [f"{n} {_change(middle[n], middle[PUBLISHED])}" for n in (OURS, GREEDY, SOFT) if n in middle]
        parts.append(f"batch {entry['batch']}, M = {entry['objects']}: {', '.join(shares)}")
    return (
        f"match_ms against {PUBLISHED} at N = {CLAIM['queries']}. What hungarian saves comes from taking layers and "
        f"images together and from one copy; what cost-greedy saves, from having no solver too, but nothing learned: "
        f"{'; '.join(parts)}"
    )


def _change(value: float, base: float) -> str:
    return f"{100 * (value / base - 1):+.0f} %"


def no_claim(device: torch.device) -> str:
    """Return what must be said of numbers that are not from a GPU, "" for those that are."""
    if device.type == "cuda":
        return ""
    return f"measured on {device}: these numbers say nothing about latency on a GPU"


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags that are not main.py's."""
    parser = argparse.ArgumentParser(
        "python -m util.bench_match",
        description=__doc__.split("\n\n")[0],
        epilog=f"Flags of main.py describe matchers and model, as after: {MODEL}. On a CPU --whole is quicker with "
        "--backbone resnet18 --enc_layers 1 --dec_layers 3.",
        allow_abbrev=False,
    )
    either = "default {} on a GPU, {} elsewhere"
    defaults = {name: either.format(ON_GPU[name], ON_CPU[name]) for name in ON_GPU}
    several = {"nargs": "+", "type": int}
    choices = {"nargs": "+", "choices": list(MATCHERS)}
    kinds = {"choices": ["trained", "random"]}
    standard = [name for name in MATCHERS if name != "soft-rounds"]
    add_flags(
        parser,
        ("--matchers", choices, standard, f"what is compared, default {' '.join(standard)}"),
        ("--queries", several, None, f"N, default {GRID['queries']}; with --whole {ONE_CELL['queries']}"),
        ("--objects", several, None, f"M, of every image, default {GRID['objects']}; --whole {ONE_CELL['objects']}"),
        ("--batches", several, None, f"images, {defaults['batches']}; with --whole {ONE_CELL['batches']}"),
        ("--predictions", kinds, "trained", "like those of a trained model (default), or noise; not with --whole"),
        ("--image_size", {"nargs": 2, "type": int}, [320, 320], "height and width, with --whole; default 320 320"),
        ("--clock", {"choices": list(CLOCKS)}, "wall", "default wall; cpu: processor time, for a busy machine"),
        ("--repeats", {"type": int}, None, f"measured repetitions, {defaults['repeats']}"),
        ("--warmup", {"type": int}, None, f"repetitions before them, {defaults['warmup']}"),
        ("--threads", {"type": int}, 0, "threads of PyTorch on the CPU; default 0: its own choice"),
        ("--output", {}, "", "JSON file for all numbers; default: save nothing"),
    )
    parser.add_argument("--whole", action="store_true", help="whole steps; else matching and losses on their own")
    return parser


def check(own: Namespace, args: Namespace) -> None:
    """Raise a UserError that names the flag if this cannot be measured."""
    if args.matcher != "hungarian":
        raise UserError(f"--matcher {args.matcher}: several are compared here; give --matchers {args.matcher} ...")
    for name in own.matchers:
        check_args(args_of(args, name))
    least = {"queries": 1, "objects": 0, "batches": 1, "repeats": 1, "warmup": 0, "threads": 0, "image_size": 1}
    check_least(own, {name: bound for name, bound in least.items() if getattr(own, name) is not None})
    if len(set(own.matchers)) < len(own.matchers):
        raise UserError(f"--matchers {' '.join(own.matchers)}: each only once")
    several = args.hybrid != "branch" or (args.num_queries_one2many and args.k_one2many)
    if own.whole and several and PUBLISHED in own.matchers:
        raise UserError(f"{PUBLISHED} matches an object once only: leave out --hybrid and --num_queries_one2many")
    if args.amp == "fp16":
        raise UserError("--amp fp16 needs a loss scale, which is not measured here: use --amp bf16")
    if args.amp != "off" and not own.whole:
        raise UserError(f"--amp {args.amp}: matchers work in float32; give it with --whole only")
    if own.output and not Path(own.output).resolve().parent.is_dir():
        raise UserError(f"--output {own.output}: there is no folder {Path(own.output).parent}; make it first")


def fill_in(own: Namespace, device: torch.device) -> None:
    """Set the flags that were not given."""
    defaults = {**GRID, **(ON_GPU if device.type == "cuda" else ON_CPU), **(ONE_CELL if own.whole else {})}
    for name, value in defaults.items():
        if getattr(own, name) is None:
            setattr(own, name, value)


def whole_forms(args: Namespace, names: Sequence[str], images: ImageBatch, targets: list[Target]) -> list[Form]:
    """Return whole steps with the matchers `names`, each with a model of its own of the same weights."""
    forms = []
    for name in names:
        loss = published_loss if name == PUBLISHED else total_loss
        forms += model_forms(args_of(args, name), images, targets, {name: loss})
    return forms


def run_cell(own: Namespace, args: Namespace, cell: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Measure one batch size, number of queries and number of objects; return its entry."""
    counts, often = [cell["objects"]] * cell["batch"], {"repeats": own.repeats, "warmup": own.warmup}
    seed_everything(args.seed)
    if own.whole:
        args = Namespace(**{**vars(args), "num_queries_one2one": cell["queries"]})
        targets = random_targets(counts, num_classes(args), device)
        images = random_images(cell["batch"], own.image_size, device)
        return {**cell, "ms": measure(whole_forms(args, own.matchers, images, targets), device, **often)}
    inputs = make_inputs(
        counts,
        layers=args.dec_layers,
        queries=cell["queries"],
        classes=num_classes(args),
        width=args.hidden_dim,
        trained=own.predictions == "trained",
        device=device,
    )
    found = compare(args, inputs) if PUBLISHED in own.matchers else {}
    samples = measure_regions(contenders(args, own.matchers, device), inputs, device, clock=own.clock, **often)
    return {**cell, **found, "ms": samples}


def _check_clock(own: Namespace, device: torch.device) -> None:
    if own.clock == "cpu" and (own.whole or device.type != "cpu"):
        raise UserError("--clock cpu is for --device cpu without --whole: the processor rests while a GPU works")


def run(own: Namespace, args: Namespace) -> list[dict[str, Any]]:
    """Measure, print and return one entry per cell of the grid."""
    device = start(args, own.threads)
    _check_clock(own, device)
    fill_in(own, device)
    where = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    print(
        f"{device}{where}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; {args.dec_layers} layers, "
        f"{num_classes(args)} classes, width {args.hidden_dim}, {'model' if own.whole else own.predictions} "
        f"predictions; medians of {own.repeats} after {own.warmup}, {own.clock} clock"
    )
    entries = []
    for batch in own.batches:
        cells = [{"batch": batch, "queries": n, "objects": m} for n in own.queries for m in own.objects]
        of_batch = []
        for cell in cells:
            print("measuring " + ", ".join(f"{name} {n}" for name, n in cell.items()), file=sys.stderr, flush=True)
            of_batch.append(run_cell(own, args, cell, device))
        entries += of_batch
        if own.whole:
            for entry in of_batch:
                print(f"\nbatch {batch}, N = {entry['queries']}, M = {entry['objects']}\n\n{step_table(entry['ms'])}")
            continue
        for region in of_batch[0]["ms"][own.matchers[0]]:
            print(f"\nbatch {batch}, {REGIONS[region]}, median (90th percentile)\n\n{table(of_batch, region)}")
    for line in summary(own, args, entries, device):
        print(f"\n{line}")
    return entries


def step_table(samples: Samples) -> str:
    """Return the medians of whole steps by part, with the ratio to the first matcher in brackets."""
    found = medians(samples, list(PARTS))
    rows = [["iter_ms", *found]]
    for part, label in PARTS.items():
        rows.append([label, *with_ratio({name: own[part] for name, own in found.items()}, next(iter(found)))])
    return markdown_table(rows)


def summary(own: Namespace, args: Namespace, entries: Sequence[dict[str, Any]], device: torch.device) -> list[str]:
    """Return the lines under the tables."""
    lines = []
    if not own.whole:
        differing = [e for e in entries if not e.get("same", True)]
        compared = [e for e in entries if "same" in e]
        if compared:
            pairs, common = (sum(count) for count in zip(*((e["pairs"][0], e["common pairs"]) for e in compared)))
            worst = max(e["difference"] for e in compared)
            lines.append(
                f"hungarian and {PUBLISHED} {'DIFFER' if differing else 'agree'}: {common} of {pairs} pairs are the "
                f"same, costs per pair differ by at most {worst:.1e} (allowed {SAME:.0e})"
            )
        lines += [claim(entries, base, args.dec_layers) for base in (OURS, PUBLISHED)]
        lines.append(savings(entries))
    return [line for line in (*lines, no_claim(device)) if line]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if the two Hungarian matchers differ, 2 after a mistake of the user."""
    own, rest = get_parser().parse_known_args(argv)
    parser = get_args_parser()
    parser.usage = "python -m util.bench_match [flags] [flags of main.py]          --help lists the former"
    args, facts = parser.parse_args([*MODEL.split(), *rest]), record()
    try:
        check(own, args)
        entries = run(own, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        content = {**facts, "environment": environment(), "benchmark": vars(own), "args": vars(args)}
        content["results"] = entries
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nall numbers are in {own.output}" if own.output else "\nnothing was saved: there is no --output")
    return 0 if all(entry.get("same", True) for entry in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
