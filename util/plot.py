"""Curves of a run, read from its `log.txt` alone.

python main.py --plot exps/a                                  loss.png, ap.png (and health.png) in exps/a
python main.py --plot exps/a exps/b --output_dir compare      both runs in the same pictures, in compare/
python -m util.plot exps/a exps/b --out compare               the same
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from util import dist
from util.errors import UserError

Entry = dict[str, Any]

# (title, key without train_ or test_); the terms are those of the last decoder layer, before their weights.
LOSSES = (
    ("total loss", "loss"),
    ("class loss", "loss_ce"),
    ("box L1 loss", "loss_bbox"),
    ("GIoU loss", "loss_giou"),
    ("class error, %", "class_error"),
    ("learning rate", "lr"),
)
# (title, key, value of a dotted line or None, what it means); see models/assign/health.py.
HEALTH = (
    ("distinct queries per object", "distinct", 0.7, "below 0.7: collapse"),
    ("objects without a query", "unassigned", 0.02, "above 0.02: too many"),
    ("strongest correspondence", "c_max", 0.99, "above 0.99 in the first tenth: saturated"),
    ("agreement with Hungarian", "agree", 0.3, "below 0.3 late: poor choice"),
    ("cost above the optimum", "regret", None, ""),
    ("surplus detections per object", "dup", 0.2, "healthy below 0.2"),
    ("agreement, small objects", "agree_small", 0.3, "below 0.3 late: poor choice"),
    ("cost, small objects", "regret_small", None, ""),
    ("objects with another query than before", "flip", None, ""),
)
# Positions in the 12 numbers of COCO evaluation.
PRECISIONS = (("AP", 0), ("AP50", 1), ("AP75", 2))
SIZES = (("AP small", 3), ("AP medium", 4), ("AP large", 5))


def plot_run(output_dir: Path) -> list[Path]:
    """Write `loss.png` and, if there is something for them, `ap.png` and `health.png` into the folder of a run.

    Args:
        output_dir: folder of a run, with its `log.txt`.

    Returns:
        the files written.

    Raises:
        UserError: no `log.txt`, nothing in it, or matplotlib is not installed.
    """
    return plot_runs([output_dir], Path(output_dir))


def plot_runs(output_dirs: Sequence[Path], folder: Path) -> list[Path]:
    """Write the same with the curves of several runs into `folder`.

    `ap.png` needs a run that was evaluated, `health.png` one that matches without a solver.
    """
    runs = _read_all(output_dirs)
    plt = _pyplot()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = [_save(plt, _loss_figure(plt, runs), folder / "loss.png")]
    if any("test_coco_eval_bbox" in entry for entries in runs.values() for entry in entries):
        written.append(_save(plt, _ap_figure(plt, runs), folder / "ap.png"))
    if any("train_unassigned_unscaled" in entry for entries in runs.values() for entry in entries):
        written.append(_save(plt, _health_figure(plt, runs), folder / "health.png"))
    return written


def read_log(output_dir: Path) -> list[Entry]:
    """Return the lines of `log.txt` by epoch.

    A resumed run may have written an epoch twice: the later line counts. A line cut off by a killed run is left out.

    Raises:
        UserError: the file is missing or has no epoch in it.
    """
    path = output_dir / "log.txt"
    if not path.is_file():
        raise UserError(f"no {path}: give the --output_dir of a run that has finished at least one epoch")
    by_epoch: dict[int, Entry] = {}
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and "epoch" in entry:
            by_epoch[entry["epoch"]] = entry
    if not by_epoch:
        raise UserError(f"{path}: no line is a JSON object with an epoch; the run has not finished an epoch yet")
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _read_all(output_dirs: Sequence[Path]) -> dict[str, list[Entry]]:
    """Return the logs by the names of their runs; all that cannot be read are told at once."""
    paths = list(dict.fromkeys(Path(path) for path in output_dirs))  # a run that is named twice is drawn once
    runs, wrong = {}, []
    for name, path in zip(_names(paths), paths):
        try:
            runs[name] = read_log(path)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    return runs


def curve(entries: Sequence[Entry], value: Callable[[Entry], float | None]) -> tuple[list[int], list[float]]:
    """Return (epochs counted from 1, values) of the entries that have a value."""
    points = [(entry["epoch"] + 1, value(entry)) for entry in entries]
    points = [(epoch, y) for epoch, y in points if y is not None]
    return [epoch for epoch, _ in points], [y for _, y in points]


def coco_number(position: int, prefix: str = "test_") -> Callable[[Entry], float | None]:
    """Return a reader of one of the 12 numbers; -1, COCO's "no such objects", is no value.

    Args:
        prefix: `ema_test_` for those of the averaged weights.
    """

    def read(entry: Entry) -> float | None:
        numbers = entry.get(f"{prefix}coco_eval_bbox")
        return numbers[position] if numbers and numbers[position] >= 0 else None

    return read


def _names(output_dirs: Sequence[Path]) -> list[str]:
    """Return short labels: folder names, or whole paths where folder names are not unique."""
    paths = [Path(path) for path in output_dirs]
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _loss_figure(plt: Any, runs: dict[str, list[Entry]]) -> Any:
    figure, grid = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axes, (title, key) in zip(grid.flat, LOSSES):
        for number, (name, entries) in enumerate(runs.items()):
            for part, style in (("train", "-"), ("test", "--"), ("ema_test", ":")):
                epochs, values = curve(entries, lambda entry, k=f"{part}_{key}": entry.get(k))
                shown = part.replace("ema_test", "test EMA")
                label = shown if len(runs) == 1 else f"{name}, {shown}"
                _draw(axes, epochs, values, label, f"C{number}", style)
        _finish(axes, title, legend=key == "loss")
        if key == "lr":
            axes.set_yscale("log")
    return figure


def _ap_figure(plt: Any, runs: dict[str, list[Entry]]) -> Any:
    """Draw AP over the epochs: of one run in two panels, of several in a panel per number; averaged weights dashed."""
    if len(runs) > 1:
        figure, grid = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
        panels = [(axes, title, [("", position)]) for axes, (title, position) in zip(grid.flat, PRECISIONS + SIZES)]
    else:
        figure, grid = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
        panels = list(zip(grid, ("average precision", "by object size"), (PRECISIONS, SIZES)))
    for axes, title, numbers in panels:
        color = 0
        for name, entries in runs.items():
            for label, position in numbers:
                for prefix, style, mark in (("test_", "-", ""), ("ema_test_", "--", " EMA")):
                    epochs, values = curve(entries, coco_number(position, prefix))
                    last = f" {values[-1]:.3f}" if values else ""
                    _draw(axes, epochs, values, (label or name) + mark + last, f"C{color}", style)
                color += 1
        _finish(axes, title, legend=True)
        axes.set_ylim(0, 1)
    return figure


def _health_figure(plt: Any, runs: dict[str, list[Entry]]) -> Any:
    """Draw the measures of assignments that some run has: cost-greedy has fewer, Hungarian matching hardly any."""
    entries = [entry for run in runs.values() for entry in run]
    shown = [m for m in HEALTH if any(measure(p, m[1])(e) is not None for p in ("train", "test") for e in entries)]
    rows = -(-len(shown) // 3)
    figure, grid = plt.subplots(rows, 3, figsize=(13, 3.4 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, key, limit, meaning) in zip(grid.flat, shown):
        for number, (name, own) in enumerate(runs.items()):
            for part, style in (("train", "-"), ("test", "--")):
                label = part if len(runs) == 1 else f"{name}, {part}"
                _draw(axes, *curve(own, measure(part, key)), label, f"C{number}", style)
        _finish(axes, f"{title} ({key})", legend=False)
        if limit is not None:
            axes.axhline(limit, color="red", linestyle=":", label=meaning)
        if "regret" not in key:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    return figure


def measure(part: str, key: str) -> Callable[[Entry], float | None]:
    """Return a reader of a measure; those that do not come from the criterion have no suffix."""
    return lambda entry: entry.get(f"{part}_{key}_unscaled", entry.get(f"{part}_{key}"))


def _draw(axes: Any, epochs: list[int], values: list[float], label: str, color: str, style: str) -> None:
    """Draw one curve, with marks while there are few points: a single epoch is no line."""
    if values:
        marker = "o" if len(values) <= 20 else None
        axes.plot(epochs, values, style, label=label, color=color, marker=marker, markersize=4)


def _finish(axes: Any, title: str, *, legend: bool) -> None:
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    low, high = axes.dataLim.intervalx
    if low == high:  # a single epoch
        axes.set_xlim(low - 1, high + 1)
    axes.grid(alpha=0.3)
    if not axes.has_data():
        axes.text(0.5, 0.5, "no values", ha="center", va="center", transform=axes.transAxes, color="gray")
    elif legend:
        axes.legend(fontsize="small")


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _pyplot() -> Any:
    """Import pyplot with a backend that needs no display."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("curves need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_command(args: argparse.Namespace) -> None:
    """Run `main.py --plot RUN [RUN ...] [--output_dir DIR]`; a single run is drawn into its own folder."""
    written = plot_runs(args.plot, Path(args.output_dir or args.plot[0]))
    dist.info("\n".join(f"wrote {path}" for path in written))


def main() -> None:
    """Plot the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Curves of one run, or of several in the same pictures.")
    parser.add_argument("output_dirs", nargs="+", type=Path, help="--output_dir of each run")
    parser.add_argument("--out", type=Path, help="folder of the pictures; not given: the run's own (one run only)")
    args = parser.parse_args()
    if args.out is None and len(args.output_dirs) > 1:
        parser.error("several runs: say with --out where the pictures go")
    try:
        written = plot_runs(args.output_dirs, args.out or args.output_dirs[0])
    except UserError as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
