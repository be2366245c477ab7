"""Measure the operator's backends on this machine: `python ops/benchmark.py`.

Prints tables: the time of a forward pass and of a forward with a backward pass as ratios to the reference (plain
PyTorch, one grid_sample per level); the error of every backend against the reference in float64, and whether two
backward passes give the same bits; and, for the attention layer as a whole, the time and the memory kept for the
backward pass with the fused operator and without. All candidates of a row run in one process by turns, so that what
else the machine does falls on all of them alike.

With one thread the CPU is timed in seconds of the process, which others on the machine do not lengthen; with more, and
on a GPU, by the clock. The `cpu` backend is measured once per instruction set of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ops
from ops import benchmark_layer, selection
from ops.benchmark_record import record, shortened

LEVELS = ((100, 167), (50, 84), (25, 42), (13, 21))  # an image of 800 x 1333, strides 8 to 64
HEADS, WIDTH, POINTS = 8, 32, 4
SHAPES = {"enc800": None, "dec300": 300, "dec900": 900}  # queries; None: one per cell, as in the encoder
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("forward", "forward+backward")
ERROR_QUERIES = 300

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # value, locations, weights, gradient of the output


@dataclass(frozen=True)
class Candidate:
    """A backend on a device; `isa` is the instruction set of the `cpu` backend, empty for the others."""

    backend: str
    device: str
    isa: str = ""

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.backend} {self.isa}".strip()


@dataclass
class Row:
    """Seconds of one candidate in one case."""

    shape: str
    mode: str
    dtype: str
    threads: int
    candidate: str
    device: str
    clock: str
    median: float
    least: float
    most: float
    ratio: float  # how many times faster than the reference on the same device
    ratio_least: float = 0.0  # of one turn
    ratio_most: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module's docstring."""
    args = parse(arguments)
    report = {**record(), "arguments": vars(args), "times": [], "errors": [], "layers": []}
    print("\n".join(machine(report)), flush=True)
    candidates = available(args.backends, args.devices)
    for device in dict.fromkeys(candidate.device for candidate in candidates):
        own = [candidate for candidate in candidates if candidate.device == device]
        for dtype in args.dtypes if "operator" in args.what else ():
            print(f"\nErrors on {device}, {dtype}: largest difference from float64 over the largest number\n")
            report["errors"] += errors(own, dtype, args.dist)
        for threads in args.threads if device == "cpu" else args.threads[:1]:
            torch.set_num_threads(threads)
            for dtype in args.dtypes:
                title = f"{dtype}, batch {args.batch}" + (f", {threads} thread(s)" if device == "cpu" else "")
                if "operator" in args.what:
                    print(f"\nTimes on {device}, {args.dist} locations, {title}\n")
                    report["times"] += times(own, dtype, threads, args)
                if "layer" in args.what:
                    print(f"\nThe attention layer on {device}, {title}\n")
                    report["layers"] += layers(own[:2][-1], dtype, threads, args)
    if args.output:
        report["figures"] = figures("operator", report["times"], args) + figures("layer", report["layers"], args)
        Path(args.output).write_text(json.dumps(report, indent=2, default=asdict) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what", nargs="+", default=["operator", "layer"], choices=("operator", "layer"), help="what to measure"
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="encoder and decoder calls")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=DTYPES, help="type of the value")
    parser.add_argument("--backends", nargs="+", default=list(selection.BACKENDS), choices=selection.BACKENDS)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"], choices=("cpu", "cuda"))
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="numbers of threads on the CPU")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each candidate")
    parser.add_argument(
        "--dist",
        default="model",
        choices=("model", "uniform"),
        help="locations near the queries, as a trained model has them, or anywhere, which is the worst for caches",
    )
    parser.add_argument("--output", "--json", help="write all numbers to this file")
    args = parser.parse_args(arguments)
    for name in ("threads", "batch", "repeats"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    return args


def machine(facts: dict) -> list[str]:
    """Return lines about hardware and versions."""
    own, versions = facts["machine"], facts["versions"]
    load = "" if own["load"] is None else f", load {own['load']:.1f}"
    lines = [f"torch {torch.__version__}, python {versions['python']} on {own['system']}"]
    lines.append(f"CPU: {own['processor']}, {own['cores']} logical cores{load}")
    if own["gpu"]:
        lines.append(f"GPU: {own['gpu']}, CUDA {versions['cuda']}")
    return lines


def available(backends: Sequence[str], devices: Sequence[str]) -> list[Candidate]:
    """Return what can be measured here; the reference, which the ratios need, first on every device."""
    found = []
    for device in devices:
        if device == "cuda" and not torch.cuda.is_available():
            continue
        found.append(Candidate("reference", device))
        if device not in backends:
            continue
        try:
            ops.set_backend(device)
            selection.active_backend(device)
        except ValueError as error:
            print(f"not measured: {error}")
            continue
        found += [Candidate(device, device, isa) for isa in (ops.cpu_isas() if device == "cpu" else ("",))]
    ops.set_backend("auto")
    return found


@contextmanager
def active(candidate: Candidate) -> Iterator[None]:
    """Let the operator be computed by the candidate."""
    before = os.environ.pop(selection.ISA_VARIABLE, None)
    ops.set_backend(candidate.backend)
    if candidate.isa:
        os.environ[selection.ISA_VARIABLE] = candidate.isa
    try:
        yield
    finally:
        ops.set_backend("auto")
        os.environ.pop(selection.ISA_VARIABLE, None)
        if before is not None:
            os.environ[selection.ISA_VARIABLE] = before


def draw(batch: int, queries: int | None, dist: str, dtype: torch.dtype, device: str) -> Inputs:
    """Return inputs like those of a model; locations and weights stay float32 for half precision, as under autocast.

    Locations `model`: of an encoder, rings around every cell with noise of one cell; of a decoder, rings inside random
    boxes. `uniform`: anywhere, a tenth of them outside.
    """
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in LEVELS)
    count = cells if queries is None else queries
    shape = (batch, count, HEADS, len(LEVELS), POINTS)
    if dist == "uniform":
        locations = torch.rand(*shape, 2, generator=generator) * 1.1 - 0.05
    else:
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        ring = torch.stack([angle.cos(), angle.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        offsets = ring[:, None, None, :] * torch.arange(1, POINTS + 1)[:, None]
        noise = torch.randn(*shape, 2, generator=generator)
        if queries is None:
            sizes = torch.tensor([(w, h) for h, w in LEVELS], dtype=torch.float32)[:, None]
            locations = centres()[:, None, None, None] + (offsets + noise) / sizes
        else:
            centre = torch.rand(batch, count, 1, 1, 1, 2, generator=generator)
            size = torch.rand(batch, count, 1, 1, 1, 2, generator=generator) * 0.3 + 0.02
            locations = centre + (offsets + 0.5 * noise) / POINTS * size * 0.5
    weights = torch.randn(*shape[:3], len(LEVELS) * POINTS, generator=generator).softmax(-1).view(shape)
    value = torch.randn(batch, cells, HEADS, WIDTH, generator=generator)
    grad = torch.randn(batch, count, HEADS * WIDTH, generator=generator)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    return value.to(device, dtype), locations.to(device, other), weights.to(device, other), grad.to(device, dtype)


def centres() -> Tensor:
    """Return the centres (cells, 2) of all cells as (x, y) in 0..1."""
    grids = []
    for h, w in LEVELS:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        grids.append(torch.stack([x.flatten(), y.flatten()], -1))
    return torch.cat(grids)


def forward(inputs: Inputs) -> Tensor:
    """Run the operator without recording."""
    value, locations, weights, _ = inputs
    with torch.no_grad():
        return ops.ms_deform_attn(value, LEVELS, locations, weights)


def forward_backward(inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the output and the gradients of value, locations and weights."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = ops.ms_deform_attn(leaves[0], LEVELS, *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, inputs[3])


def errors(candidates: Sequence[Candidate], dtype: str, dist: str) -> list[dict]:
    """Print and return the errors against float64 of the same numbers, and whether the bits repeat."""
    inputs = draw(1, ERROR_QUERIES, dist, DTYPES[dtype], candidates[0].device)
    with active(candidates[0]):
        exact = forward_backward(tuple(tensor.double() for tensor in inputs))
    names = ("output", "grad value", "grad locations", "grad weights")
    rows, found = [("", *names, "same bits twice")], []
    for candidate in candidates:
        with active(candidate):
            first, second = forward_backward(inputs), forward_backward(inputs)
        relative = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, exact, strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        rows.append((candidate.name, *(f"{error:.1e}" for error in relative), "yes" if same else "no"))
        found.append({"candidate": candidate.name, "device": candidate.device, "dtype": dtype, "same_bits": same})
        found[-1] |= dict(zip(names, relative, strict=True))
    print(table(rows), flush=True)
    return found


def times(candidates: Sequence[Candidate], dtype: str, threads: int, args: argparse.Namespace) -> list[Row]:
    """Print and return the times of all shapes."""
    found = []
    print(table([("", "pass", "backend", "ms (median)", "least .. most", "times the reference's speed")]), flush=True)
    for shape in args.shapes:
        inputs = draw(args.batch, SHAPES[shape], args.dist, DTYPES[dtype], candidates[0].device)
        for mode, call in zip(MODES, (forward, forward_backward), strict=True):
            samples, clock = measure(candidates, lambda call=call, inputs=inputs: call(inputs), threads, args.repeats)
            base = statistics.median(samples[candidates[0].name])
            for candidate in candidates:
                seconds = samples[candidate.name]
                middle = statistics.median(seconds)
                row = Row(shape, mode, dtype, threads, candidate.name, candidate.device, clock, middle, 0, 0, 0)
                row.least, row.most, row.ratio = min(seconds), max(seconds), base / middle
                gains = [a / b for a, b in zip(samples[candidates[0].name], seconds, strict=True)]
                row.ratio_least, row.ratio_most = min(gains), max(gains)
                found.append(row)
                spread = f"{1e3 * row.least:.2f} .. {1e3 * row.most:.2f}"
                print(table_line((shape, mode, row.candidate, f"{1e3 * middle:.2f}", spread, f"{row.ratio:.1f}")))
            sys.stdout.flush()
    return found


def layers(candidate: Candidate, dtype: str, threads: int, args: argparse.Namespace) -> list[benchmark_layer.LayerRow]:
    """Print and return times and kept memory of the attention layer, computed by the fastest backend in both ways."""
    found = []
    head = ("", "pass", "layer", "ms (median)", "least .. most", "times the unfused's speed", "kept MiB")
    print(table([head]), flush=True)
    for shape in args.shapes:
        points = benchmark_layer.reference_points(SHAPES[shape], len(LEVELS), centres(), args.batch)
        case = benchmark_layer.LayerCase(LEVELS, points, DTYPES[dtype], candidate.device)
        labels = (shape, dtype, candidate.name)
        with active(candidate):
            for row in benchmark_layer.rows(
                case, labels, threads, lambda runs: by_turns(runs, candidate.device, threads, args.repeats)[0]
            ):
                found.append(row)
                spread = f"{1e3 * row.least:.2f} .. {1e3 * row.most:.2f}"
                cells = (f"{1e3 * row.median:.2f}", spread, f"{row.ratio:.2f}", f"{row.kept / 2**20:.1f}")
                print(table_line((shape, row.mode, row.way, *cells)), flush=True)
    return found


def figures(kind: str, rows: Sequence[Row | benchmark_layer.LayerRow], args: argparse.Namespace) -> list[dict]:
    """Return one entry for each case: the plain way, and the way that training takes on this machine, in ms.

    Of several compiled candidates that is the first. What only the reference could do has no entry: it is compared with
    nothing, or says of the layer what nobody trains with.
    """
    cases: dict[tuple, list] = {}
    for row in rows:
        threads = row.threads if row.device == "cpu" else 0
        cases.setdefault((row.shape, row.mode, row.dtype, row.device, threads), []).append(row)
    found = []
    for key, (plain, *others) in cases.items():
        for own in others[:1]:
            times = [[shortened(1e3 * x) for x in (row.median, row.least, row.most)] for row in (plain, own)]
            gains = [shortened(x) for x in (own.ratio, own.ratio_least, own.ratio_most)]
            case = dict(zip(("shape", "mode", "dtype", "device", "threads"), key)) | {"batch": args.batch}
            entry = {"kind": kind, "case": case, "plain": times[0], "ours": times[1], "times_as_fast": gains}
            if kind == "operator":
                found.append({**entry, "case": {**case, "dist": args.dist}, "way": own.candidate})
            elif own.backend != "reference":
                found.append({**entry, "kept": [plain.kept, own.kept], "way": own.backend})
    return found


def measure(
    candidates: Sequence[Candidate], call: Callable[[], object], threads: int, repeats: int
) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of one call, `repeats` times for every candidate, by turns, and the name of the clock."""
    runs = {candidate.name: (lambda candidate=candidate: active(candidate), call) for candidate in candidates}
    return by_turns(runs, candidates[0].device, threads, repeats)


def by_turns(runs: benchmark_layer.Runs, device: str, threads: int, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of one call, `repeats` times for every run, by turns, and the name of the clock."""
    gpu = device == "cuda"
    clock = time.process_time if threads == 1 and not gpu else time.perf_counter
    wait = torch.cuda.synchronize if gpu else lambda: None
    samples: dict[str, list[float]] = {name: [] for name in runs}
    counts = {}
    for repetition in range(-1, repeats):
        for name, (enter, call) in runs.items():
            with enter():
                count = counts.get(name, 1)
                wait()
                start = clock()
                for _ in range(count):
                    call()
                wait()
                seconds = (clock() - start) / count
            if repetition < 0:  # the first call warms up, and tells how many make a time long enough to read
                counts[name] = max(1, min(20, round(0.05 / max(seconds, 1e-6))))
            else:
                samples[name].append(seconds)
    return samples, clock.__name__


def table_line(cells: Sequence[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first row is the head."""
    return "\n".join([table_line(rows[0]), "|---" * len(rows[0]) + "|", *(table_line(row) for row in rows[1:])])


if __name__ == "__main__":
    main()
