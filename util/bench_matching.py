"""Time of Hungarian matching: the published way against ours, and the solver alone against SciPy.

python util/benchmark.py matching                   batches of 16 images, 7 layers; 300 and 900 queries, H-DETR's 1500
python util/benchmark.py matching --threads 0       on all threads

*Published* is the way of DETR, Deformable-DETR and H-DETR: layer by layer, the queries of all images against the
objects of all images with `torch.cdist`, a copy to the host, SciPy image by image; for one-to-many matching every
object stands K times in the list. *Ours* computes the costs of each image with its own objects, of all layers at once,
and solves all problems in one call. The solver alone gets costs that lie where it runs, on the host or on the GPU;
SciPy gets the copies ready, on the host.

Predictions are as after some training (half of the queries have found an object) or from scratch (noise). Both ways
take turns in every repetition, on the same inputs; they must find pairs of the same cost, which is checked before
anything is timed (exit status 1 if not). Times are CPU time of this process, which other programs disturb little;
with more threads, and on a GPU, they are wall clock.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from models.assign import HungarianMatcher, Request
from models.assign.hungarian import UNMATCHABLE
from ops.assignment import gpu_solver_ready, host_solver_ready, solve, solve_on_gpu
from ops.benchmark_record import compared, cpu_name, record
from util.bench_common import check_least, markdown_table
from util.bench_matchers import CLOCKS, Inputs, PublishedMatcher, make_inputs, waiter
from util.bench_step import repeated
from util.environment import environment
from util.errors import UserError
from util.rng import seed_everything
from util.structures import Assignment, FlatTargets, Supervision

SAME = 1e-6  # relative difference of two optima; the costs of the published way differ by rounding: 100 times as much
STEPS = ((300, 1), (900, 1), (1500, 6))  # queries, K
PROBLEMS = ((300, 7, 1), (900, 60, 1), (1500, 60, 6), (22223, 20, 1))  # slots, objects, K; the last: encoder tokens
AT_ONCE = 8  # problems of a kind that are solved together
SHAPES = {"trained": True, "scratch": False}

Way = Callable[[], Any]
Times = dict[str, list[float]]  # ms of every repetition by way


@dataclass
class Case:
    """Two ways to do the same."""

    name: str
    published: Way
    ours: Way
    apart: float  # relative difference of what their pairs cost


def object_counts(images: int, seed: int) -> list[int]:
    """Return how many objects each image has: about 7 as in COCO, few of them many more, at most 60."""
    return np.random.default_rng(seed).geometric(1 / 7.3, images).clip(max=60).tolist()


def step_case(own: Namespace, queries: int, repeat: int, shape: str) -> Case:
    """Return all matching of a step."""
    counts = object_counts(own.batch_size, own.seed)
    inputs = make_inputs(
        counts, layers=own.layers, queries=queries, classes=91, width=1, trained=SHAPES[shape], device=own.device
    )
    matcher = HungarianMatcher()
    published = PublishedMatcher(matcher)
    copies = replace(inputs, targets=[repeated(target, repeat) for target in inputs.targets])

    def match(matcher: Callable, inputs: Inputs, repeat: int) -> Assignment:
        targets = FlatTargets.of(inputs.targets)
        return matcher([Request("one2one", inputs.predictions, targets, Supervision(repeat=repeat))])[0]

    ways = (lambda: match(published, copies, 1)), (lambda: match(matcher, inputs, repeat))
    costs, flat = matcher.costs(inputs.predictions, FlatTargets.of(inputs.targets)), FlatTargets.of(inputs.targets)
    sizes = torch.tensor(counts, device=flat.image.device)
    totals = [_total(costs, flat, sizes, way()) for way in ways]
    k = f", K = {repeat}" if repeat > 1 else ""
    name = f"step: {queries} queries{k}, {sum(counts)} objects, {shape}"
    return Case(name, *ways, abs(totals[0] - totals[1]) / abs(totals[0]))


def _total(costs: Tensor, flat: FlatTargets, sizes: Tensor, found: Assignment) -> float:
    target = flat.starts[found.image] + found.target % sizes[found.image]
    return costs[target, found.layer, found.slot].double().sum().item()


def solver_case(own: Namespace, slots: int, objects: int, repeat: int, shape: str) -> Case:
    """Return the solving of `AT_ONCE` problems of one kind."""
    inputs = make_inputs([objects] * AT_ONCE, layers=1, queries=slots, classes=91, width=1, trained=SHAPES[shape])
    with torch.no_grad():
        costs = HungarianMatcher().costs(inputs.predictions, FlatTargets.of(inputs.targets))
    flat = costs.flatten().numpy()
    table = np.array([[i * objects * slots, objects, slots, slots, repeat] for i in range(AT_ONCE)])
    matrices = [np.tile(part, (repeat, 1)) for part in flat.reshape(AT_ONCE, objects, slots)]

    def by_scipy() -> list[tuple[np.ndarray, np.ndarray]]:
        return [linear_sum_assignment(matrix) for matrix in matrices]

    theirs = sum(matrix[pairs].sum(dtype=np.float64) for matrix, pairs in zip(matrices, by_scipy()))
    device = torch.device(own.device)
    on_device = costs.flatten().to(device)
    ready = gpu_solver_ready(device)

    def solved() -> Tensor | np.ndarray:
        return solve_on_gpu(on_device, table, UNMATCHABLE) if ready else solve(flat, table)

    index, slot, target = torch.as_tensor(solved()).cpu().numpy()
    ours = flat[(index * objects + target) * slots + slot].sum(dtype=np.float64)
    name = f"solver: {slots} x {objects}{f', K = {repeat}' if repeat > 1 else ''}, {shape}"
    return Case(name, by_scipy, solved, abs(theirs - ours) / abs(theirs))


def measure(case: Case, own: Namespace, clock: Callable[[], float]) -> Times:
    """Return the milliseconds of every repetition; quick ways run several times in each."""
    wait, times, rounds = waiter(torch.device(own.device)), {"published": [], "ours": []}, {}
    for repetition in range(-1, own.repeats):  # the first one warms up
        for name in times:
            way, begin = getattr(case, name), clock()
            for _ in range(rounds.get(name, 1)):
                way()
            wait()
            ms = 1000 * (clock() - begin) / rounds.get(name, 1)
            if repetition < 0:
                rounds[name] = max(1, min(int(20 / max(ms, 0.01)), 1000))  # clocks are coarse
            else:
                times[name].append(ms)
    return times


def table(results: dict[str, tuple[float, Times]]) -> str:
    """Return milliseconds and ratios, medians and ranges, and the difference of the costs."""
    rows = [["", "published or SciPy, ms", "ours, ms", "ratio", "costs differ by"]]
    for name, (apart, times) in results.items():
        ratios = [a / b for a, b in zip(times["published"], times["ours"])]
        rows.append([name, *(_spread(values, 2) for values in times.values()), _spread(ratios, 1), f"{apart:.0e}"])
    return markdown_table(rows)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def figures(results: dict[str, tuple[float, Times]], own: Namespace) -> list[dict[str, Any]]:
    """Return medians and ranges in ms, one entry per case."""
    sizes = {"device": own.device, "threads": own.threads, "layers": own.layers}
    return [
        compared(
            "matching",
            {"name": name, **sizes, "batch": own.batch_size if name.startswith("step") else AT_ONCE},
            *(times[way] for way in ("published", "ours")),
        )
        for name, (_, times) in results.items()
    ]


def get_parser() -> argparse.ArgumentParser:
    """Return the flags of this benchmark."""
    parser = argparse.ArgumentParser(prog="util/benchmark.py matching", description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("step", "solver"), default=["step", "solver"])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of the predictions")
    parser.add_argument("--queries", nargs="*", type=int, default=[], help="only cases with so many; none: all")
    parser.add_argument("--batch_size", default=16, type=int, help="images of a step")
    parser.add_argument("--layers", default=7, type=int, help="of a step: six of the decoder and the encoder's")
    parser.add_argument("--repeats", default=5, type=int, help="repetitions after one to warm up")
    parser.add_argument("--threads", default=1, type=int, help="0: all")
    parser.add_argument("--device", default="cpu", help="where predictions are")
    parser.add_argument("--seed", default=42, type=int, help="of the inputs")
    parser.add_argument("--output", default="", help="JSON file for all numbers; empty: none")
    return parser


def run(own: Namespace) -> dict[str, tuple[float, Times]]:
    """Measure, print and return, by case, the difference of the costs and the times."""
    check_least(own, {"batch_size": 1, "layers": 1, "repeats": 1, "threads": 0, "seed": 0})
    if own.threads:
        torch.set_num_threads(own.threads)
    cpu_time = own.threads == 1 and torch.device(own.device).type == "cpu"
    clock = CLOCKS["cpu" if cpu_time else "wall"]
    builders = [(step_case, case) for case in STEPS if "step" in own.parts]
    builders += [(solver_case, case) for case in PROBLEMS if "solver" in own.parts]
    results = {}
    for build, sizes in builders:
        for shape in own.shapes if not own.queries or sizes[0] in own.queries else ():
            seed_everything(own.seed)
            case = build(own, *sizes, shape)
            results[case.name] = (case.apart, measure(case, own, clock))
    solver = "compiled" if host_solver_ready() else "SciPy"
    print(
        f"{own.device}, {torch.get_num_threads()} thread(s) of {cpu_name()}; our solver: {solver}; {own.batch_size} "
        f"images and {own.layers} layers a step, {AT_ONCE} problems in a call of the solver alone; "
        f"{'CPU time' if cpu_time else 'wall clock'}, medians of {own.repeats}, in brackets the range\n\n"
        f"{table(results)}\n"
    )
    print("\n".join(line for line in environment() if line.startswith(("python", "torch:", "numpy", "scipy"))))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if pairs cost more than they must, 2 after a mistake of the user."""
    own, facts = get_parser().parse_args(argv), record()
    try:
        results = run(own)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if own.output:
        found = {name: {"costs_differ_by": apart, "ms": times} for name, (apart, times) in results.items()}
        content = {**facts, "environment": environment(), "benchmark": vars(own), "figures": figures(results, own)}
        content["results"] = found
        Path(own.output).write_text(json.dumps(content, indent=1) + "\n")
    bounds = {name: SAME * (100 if name.startswith("step") else 1) for name in results}
    return 0 if all(apart <= bounds[name] for name, (apart, _) in results.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
