"""What an output folder holds, read for its report. Nothing here is required: what is missing becomes a remark."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DetectionDataset, build_dataset
from datasets.evaluators import METRICS, CocoEvaluator
from util.args import get_args_parser
from util.errors import UserError
from util.eval_curves import EvalCurves, eval_curves, read_eval_curves
from util.plot import Entry, read_log

REPORT_FLAGS = ("output_dir", "plot", "report", "report_images")  # say nothing about a run


@dataclass
class Run:
    """An output folder of a training, or of an evaluation (`--eval`)."""

    folder: Path
    args: dict[str, Any] | None  # of args.json, else of eval_args.json
    eval_args: dict[str, Any] | None  # of what made eval/: the same, unless `--eval` came after the training
    log: list[Entry]  # one per epoch; none after an evaluation only
    environment: list[str]  # lines of the last block of env.txt
    stats: dict[str, Any]  # of the stored evaluation, keys without test_
    per_class: list[dict[str, str]]  # rows of eval/per_class.csv
    remarks: list[str] = field(default_factory=list)

    def changed_args(self) -> list[tuple[str, Any, Any]]:
        """Return (flag, value, default) of the flags that differ from the defaults."""
        defaults = vars(get_args_parser().parse_args([]))
        given = self.args or {}
        return [
            (name, value, defaults.get(name, "no such flag any more"))
            for name, value in given.items()
            if name not in REPORT_FLAGS and (name not in defaults or json.loads(json.dumps(defaults[name])) != value)
        ]


@dataclass
class Evaluated:
    """The stored evaluation, with data set if its files are still there."""

    curves: EvalCurves | None
    dataset: DetectionDataset | None
    rows: dict[int, Any]  # image id -> detections
    remark: str = ""  # why something is missing


def read_run(folder: Path) -> Run:
    """Read what there is.

    Raises:
        UserError: no such folder, or neither a log nor an evaluation in it.
    """
    if not folder.is_dir():
        raise UserError(f"--report {folder}: there is no such folder; give the --output_dir of a run")
    remarks: list[str] = []
    try:
        log = read_log(folder)
    except UserError:
        log = []
        remarks.append("There is no log.txt with a finished epoch here, so no training curves.")
    found = (folder / "eval" / "results.json").is_file() or (folder / "eval" / "stats.json").is_file()
    if not log and not found:
        raise UserError(
            f"--report {folder}: no epoch in log.txt and no eval/results.json; give the --output_dir of a run"
        )
    trained, evaluated = (_json(folder / name, remarks) for name in ("args.json", "eval_args.json"))
    args = trained or evaluated
    later = evaluated is not None and _time(folder / "eval_args.json") > _time(folder / "log.txt")
    if args is None:
        remarks.append("There is no args.json here: settings are unknown, and the images cannot be found again.")
    blocks = _text(folder / "env.txt").strip().split("\n\n")
    stats = _json(folder / "eval" / "stats.json", remarks) or _last_stats(log)
    per_class = _rows(folder / "eval" / "per_class.csv")
    eval_args = evaluated if later else args
    return Run(folder, args, eval_args, log, blocks[-1].splitlines(), stats, per_class, remarks)


def read_evaluation(run: Run) -> Evaluated:
    """Return curves and data set of `eval/results.json`; where the data is gone, the curves of the files in `eval/`."""
    results = run.folder / "eval" / "results.json"
    try:
        if not results.is_file():
            raise UserError("there is no eval/results.json")
        if run.eval_args is None:
            raise UserError("there is no args.json")
        args = get_args_parser().parse_args([])
        args = Namespace(**{**vars(args), **run.eval_args, "cache_mode": False})
        dataset = build_dataset("val", args)
        evaluator = CocoEvaluator(dataset, topk=args.topk)
        evaluator.load(results)
        return Evaluated(eval_curves(evaluator, args.confusion_score), dataset, dict(evaluator.rows))
    except (ValueError, KeyError, OSError) as error:  # also of a data set that only another version of the code knows
        remark = f"The evaluated images are not at hand ({error}), so none are shown here."
    try:
        curves = read_eval_curves(run.folder / "eval")
    except (OSError, ValueError):
        return Evaluated(None, None, {}, f"{remark} Nor are there tables of curves in eval/: evaluate with --eval.")
    old = _time(run.folder / "eval" / "confusion.csv") < _time(results) - 60
    return Evaluated(curves, None, {}, remark + " Curves are those of an earlier evaluation." * old)


def best_entry(log: list[Entry]) -> Entry | None:
    """Return the entry of the highest AP, None where nothing was evaluated."""
    evaluated = [entry for entry in log if entry.get("test_coco_eval_bbox")]
    return max(evaluated, key=lambda entry: entry["test_coco_eval_bbox"][0], default=None)


def _last_stats(log: list[Entry]) -> dict[str, Any]:
    """Return the numbers of the last evaluated epoch."""
    for entry in reversed(log):
        if numbers := entry.get("test_coco_eval_bbox"):
            named = {key.removeprefix("test_"): value for key, value in entry.items() if key.startswith("test_")}
            return {**dict(zip(METRICS, numbers)), **named}
    return {}


def _json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        remarks.append(f"{path.name} cannot be read: {error}")
        return None
    return content if isinstance(content, dict) else None


def _time(path: Path) -> float:
    """Return when a file was written; 0 where there is none."""
    return path.stat().st_mtime if path.is_file() else 0.0


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
