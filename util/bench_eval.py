"""Time of COCO's evaluation with every package that is installed, on drawn objects and detections.

python util/benchmark.py eval                                     1000 images, 100 detections each
python util/benchmark.py eval --images 5000 --evaluators hotcoco  as many as in val2017; pycocotools takes minutes

"update" is what happens while images arrive, "remaining" what is left after the last batch: both again at every
evaluation. "ground truth" happens once in a run. Packages take turns; numbers are medians in seconds of the clock, with
the processor time of all threads beside them: that of `update` + `remaining` is what the ratio compares, because it
hardly changes when something else uses the machine. Half of the images have detections with equal scores.

"same numbers" compares the twelve numbers and the arrays of precision, recall and scores with those of pycocotools, or
of the first package where pycocotools is left out: the largest difference, or "to the bit".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO

from datasets.base import silent_coco
from datasets.eval_backends import BACKENDS, Evaluated, find_backend
from datasets.evaluators import CocoEvaluator
from ops.benchmark_record import compared, record
from util.bench_common import add_flags, check_least, check_output, markdown_table
from util.environment import environment, prepare_output_dir
from util.errors import UserError
from util.structures import Detections, Target

REFERENCE = "pycocotools"
WIDTH, HEIGHT = 640, 480
CROWD = 0.02  # share of crowd regions among the objects
HITS = 0.3  # share of detections near an object of their class; the others are anywhere
JITTER = 0.1  # how far they are off, as a share of the object's sides
STAGES = ("update", "remaining")

Batch = tuple[list[Detections], list[Target]]
Times = dict[str, list[float]]  # seconds, one per repetition; "update" of the clock, "update_cpu" of the processor


@dataclass
class Truth:
    """What the evaluator asks of a data set."""

    coco: COCO
    image_ids: list[int]
    category_ids: list[int]
    class_names: list[str]


def draw_truth(images: int, objects: float, classes: int, seed: int) -> Truth:
    """Return annotations of `images` images with `objects` objects on average, sides from 8 to 320 pixels."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(1, images + 1), rng.poisson(objects, images))
    n = len(owners)
    sides = 8 * 40 ** rng.random((n, 2))
    corners = rng.random((n, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1)
    columns = zip(
        owners.tolist(),
        rng.integers(1, classes + 1, n).tolist(),
        np.concatenate([corners, sides], axis=1).tolist(),
        (rng.random(n) < CROWD).astype(int).tolist(),
    )
    annotations = [
        {"id": i, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
        for i, (image, c, box, crowd) in enumerate(columns, start=1)
    ]
    names = [f"class {i}" for i in range(1, classes + 1)]
    content = {
        "images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in range(1, images + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        "annotations": annotations,
    }
    return Truth(silent_coco(content), list(range(1, images + 1)), list(range(1, classes + 1)), names)


def draw_detections(truth: Truth, count: int, batch_size: int, seed: int) -> list[Batch]:
    """Return batches of `count` float32 detections per image, best first, and the targets that name the images."""
    rng = np.random.default_rng(seed + 1)
    found = []
    for image_id in truth.image_ids:
        near = truth.coco.imgToAnns.get(image_id, [])
        boxes = rng.random((count, 4)) * [WIDTH / 2, HEIGHT / 2, WIDTH / 2, HEIGHT / 2]
        labels = rng.integers(len(truth.category_ids), size=count)
        if near:
            hit = rng.random(count) < HITS
            chosen = rng.integers(len(near), size=count)[hit]
            base = np.asarray([a["bbox"] for a in near])[chosen]
            boxes[hit] = base + rng.normal(scale=JITTER, size=base.shape) * base[:, [2, 3, 2, 3]]
            labels[hit] = np.asarray([a["category_id"] - 1 for a in near])[chosen]
        boxes[:, 2:] = boxes[:, :2] + np.maximum(boxes[:, 2:], 1)
        scores = -np.sort(-rng.random(count))
        scores = np.round(scores, 2) if image_id % 2 else scores
        tensors = (torch.from_numpy(x) for x in (scores.astype("f4"), labels, boxes.astype("f4")))
        nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)
        found.append((Detections(*tensors), Target(*nothing, image_id, (HEIGHT, WIDTH))))
    parts = (found[i : i + batch_size] for i in range(0, len(found), batch_size))
    return [([d for d, _ in part], [t for _, t in part]) for part in parts]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what `work` returns, its seconds, and those of the processor in all threads."""
    clock, processor = perf_counter(), process_time()
    result = work()
    return result, perf_counter() - clock, process_time() - processor


def measure(
    truth: Truth, batches: list[Batch], names: Sequence[str], *, topk: int, repeats: int
) -> tuple[dict[str, Times], dict[str, Evaluated]]:
    """Return times and results of every package; they take turns."""
    times: dict[str, Times] = {}
    evaluators, results = {}, {}
    for name in names:
        evaluators[name], *once = timed(lambda name=name: CocoEvaluator(truth, topk=topk, implementation=name))
        times[name] = {"truth": once[:1], "truth_cpu": once[1:]}
    for _ in range(repeats):
        for name, evaluator in evaluators.items():
            evaluator.reset()
            for stage, work in zip(STAGES, (lambda e=evaluator: _update(e, batches), lambda e=evaluator: _finish(e))):
                results[name], clock, processor = timed(work)
                times[name].setdefault(stage, []).append(clock)
                times[name].setdefault(f"{stage}_cpu", []).append(processor)
    return times, results


def _update(evaluator: CocoEvaluator, batches: list[Batch]) -> None:
    for detections, targets in batches:
        evaluator.update(detections, targets)


def _finish(evaluator: CocoEvaluator) -> Evaluated:
    evaluator.synchronize()
    evaluator.summarize()
    return evaluator.evaluated()


def difference(a: Evaluated, b: Evaluated) -> float:
    """Return the largest difference between two evaluations, in the twelve numbers or any entry of the arrays."""
    pairs = [(a.stats, b.stats), (a.precision, b.precision), (a.recall, b.recall), (a.scores, b.scores)]
    return max(float(np.abs(np.subtract(x, y)).max(initial=0)) for x, y in pairs)


def table(times: dict[str, Times], results: dict[str, Evaluated]) -> str:
    """Return the report as a markdown table."""
    base = REFERENCE if REFERENCE in times else next(iter(times))
    middle = {name: {stage: median(values) for stage, values in own.items()} for name, own in times.items()}
    processor = {name: own["update_cpu"] + own["remaining_cpu"] for name, own in middle.items()}
    rows = [
        ["seconds (processor)", "ground truth", "update", "remaining", "both", f"{base} / this", "same numbers"],
    ]
    for name, own in middle.items():
        shown = [f"{own[stage]:.3f} ({own[stage + '_cpu']:.3f})" for stage in ("truth", *STAGES)]
        both = f"{own['update'] + own['remaining']:.3f} ({processor[name]:.3f})"
        off = difference(results[base], results[name])
        same = "-" if name == base else f"{off:.0e}" if off else "to the bit"
        rows.append([name, *shown, both, f"{processor[base] / processor[name]:.1f}", same])
    return markdown_table(rows)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's flags."""
    parser = argparse.ArgumentParser("util/benchmark.py eval", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    number = {"type": int}
    add_flags(
        parser,
        ("--images", number, 1000, "number of images, default 1000 (val2017 has 5000)"),
        ("--objects", {"type": float}, 6.6, "objects per image on average, default 6.6"),
        ("--detections", number, 100, "per image, default 100"),
        ("--topk", number, 300, "detections kept per image, default 300"),
        ("--classes", number, 80, "default 80"),
        ("--batch_size", number, 8, "images that arrive together, default 8"),
        ("--evaluators", {"nargs": "+", "choices": list(BACKENDS)}, None, "packages, default: all that are installed"),
        ("--repeats", number, 3, "evaluations with each of them, default 3"),
        ("--threads", number, 0, "threads of hotcoco; default 0: as many as there are processors"),
        ("--seed", number, 0, "of objects and detections, default 0"),
        ("--output", {}, "", "JSON file for all numbers; empty: none"),
        ("--output_dir", {}, "", "folder for all numbers and the table; empty: none"),
    )
    return parser


def installed(names: Sequence[str] | None) -> list[str]:
    """Return the packages to measure, pycocotools first because the others are compared with it.

    Raises:
        UserError: one that was asked for is not installed.
    """
    chosen = []
    for name in names or BACKENDS:
        try:
            find_backend(name)
        except UserError as error:
            if names:
                raise
            print(f"left out: {error}")
        else:
            chosen.append(name)
    return sorted(dict.fromkeys(chosen), key=lambda name: name != REFERENCE)


def figures(times: dict[str, Times], own: Namespace) -> list[dict[str, Any]]:
    """Return seconds of the processor for `update` and `remaining`, of pycocotools beside each other package."""
    spent = {name: [sum(stages) for stages in zip(t["update_cpu"], t["remaining_cpu"])] for name, t in times.items()}
    case = {name: getattr(own, name) for name in ("images", "detections", "objects", "classes")}
    return [
        compared("eval", case, spent[REFERENCE], seconds, way=name)
        for name, seconds in spent.items()
        if REFERENCE in spent and name != REFERENCE
    ]


def run(own: Namespace, facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Measure; return the report as markdown, and all numbers."""
    check_least(own, {"images": 1, "detections": 0, "topk": 1, "classes": 1, "batch_size": 1, "repeats": 1})
    check_least(own, {"threads": 0, "objects": 0, "seed": 0})
    if own.threads:
        os.environ["RAYON_NUM_THREADS"] = str(own.threads)  # read when hotcoco first needs them
    names = installed(own.evaluators)
    truth = draw_truth(own.images, own.objects, own.classes, own.seed)
    batches = draw_detections(truth, own.detections, own.batch_size, own.seed)
    times, results = measure(truth, batches, names, topk=own.topk, repeats=own.repeats)
    where = f"{facts['machine']['processor']}, {facts['machine']['cores']} processors"
    versions = ", ".join(f"{name} {version(name)}" for name in (*names, "numpy", "torch"))
    report = (
        f"{where}; Python {facts['versions']['python']}, {versions}; {own.images} images with "
        f"{len(truth.coco.anns)} objects of {own.classes} classes and {own.detections} detections each, in batches of "
        f"{own.batch_size}; medians of {own.repeats}\n\n{table(times, results)}\n"
    )
    return report, {"seconds": times, "stats": {name: own.stats for name, own in results.items()}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 2 after a mistake of the user."""
    own, facts = get_parser().parse_args(argv), record()
    try:
        check_output(own.output)
        folder = prepare_output_dir(own.output_dir)
        report, numbers = run(own, facts)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    content = {**facts, "environment": environment(), "benchmark": vars(own), **numbers}
    content["figures"] = figures(numbers["seconds"], own)
    files = [Path(own.output)] if own.output else []
    if folder is not None:
        (folder / "bench_eval.md").write_text(report)
        files.append(folder / "bench_eval.json")
    for file in files:
        file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"saved as {' and '.join(map(str, files))}" if files else "nothing was saved: there is no --output")
    return 0
