"""The parts of the report about settings, numbers and curves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datasets.evaluators import METRICS
from util.eval_curves import RECALL, EvalCurves
from util.plot import HEALTH, LOSSES, PRECISIONS, SIZES, Entry, coco_number, curve, measure
from util.report.charts import COLORS, GREY, Line, heat_map, line_chart
from util.report.facts import Run, best_entry
from util.report.html import Html, el, join, note, percent, section, table

MEANING = {
    "AP": "average precision, mean over IoU 0.5 to 0.95",
    "AP50": "at IoU 0.5",
    "AP75": "at IoU 0.75",
    "APs": "small objects, below 32 x 32 pixels",
    "APm": "medium objects",
    "APl": "large objects, above 96 x 96 pixels",
    "AR1": "average recall, 1 detection per image",
    "AR10": "10 detections per image",
    "AR100": "100 detections per image",
    "ARs": "small objects",
    "ARm": "medium objects",
    "ARl": "large objects",
}
MATRIX = 100  # classes up to which the confusion matrix is drawn
LISTED = 30  # confusions in the list
NAMED = 10  # classes with a colour of their own; of more, the best and worst five have
TOP = ("loss.png", "ap.png", "health.png", "log.txt", "args.json", "eval_args.json", "env.txt")


def settings(run: Run) -> Html:
    """Command line, flags that differ from the defaults, versions."""
    command = [line.removeprefix("command: ") for line in run.environment if line.startswith("command: ")]
    changed = [(f"--{name}", _value(value), _value(default)) for name, value, default in run.changed_args()]
    rest = [line for line in run.environment if not line.startswith("command: ")]
    return section(
        "Settings",
        "settings",
        el("pre", command[0]) if command else note("There is no env.txt with the command line."),
        el("h3", "Flags that differ from the defaults"),
        table(["flag", "value", "default"], changed) if changed else note("none"),
        el("details", el("summary", "Environment"), el("pre", "\n".join(rest))) if rest else None,
    )


def numbers(run: Run) -> Html:
    """The twelve numbers of COCO, those of the best epoch and of the averaged weights."""
    if "AP" not in run.stats:
        return section("Results", "results", note("Nothing was evaluated yet."))
    last = run.log[-1] if run.log else {}
    columns: list[tuple[str, Callable[[int], float | None]]] = [("stored evaluation", lambda i: run.stats[METRICS[i]])]
    best = best_entry(run.log)
    if best is not None and best is not last:
        columns.append((f"best, epoch {best['epoch'] + 1}", lambda i: best["test_coco_eval_bbox"][i]))
    if last.get("ema_test_coco_eval_bbox"):
        columns.append(("averaged weights", lambda i: last["ema_test_coco_eval_bbox"][i]))
    rows = [[name, *(percent(read(i)) for _, read in columns), MEANING[name]] for i, name in enumerate(METRICS)]
    hint = el("p", "In percent; - where there is no such object.", class_="hint")
    return section("Results", "results", hint, table(["", *(name for name, _ in columns), ""], rows))


def curves(run: Run) -> Html:
    """Losses and average precision over the epochs."""
    if not run.log:
        return section("Training", "training", note("There is no log.txt here."))
    figures = []
    for title, which in (("average precision", PRECISIONS), ("by object size", SIZES)):
        lines = []
        for rank, (name, position) in enumerate(which):
            for prefix, mark in (("test_", ""), ("ema_test_", ", averaged")):
                x, y = curve(run.log, coco_number(position, prefix))
                lines.append(Line(name + mark, x, y, COLORS[rank], dashed=bool(mark)))
        figures.append(line_chart(title, lines, "epoch", y_range=(0, 1)))
    for title, key in LOSSES:
        parts = [(part, _reader(f"{part}_{key}")) for part in ("train", "test")]
        figures.append(line_chart(title, _two(run.log, parts), "epoch", log=key == "lr"))
    return section("Training", "training", el("div", *figures, class_="grid"))


def health(run: Run) -> Html | None:
    """What is known about the assignments, None where the log has nothing."""
    figures = []
    for title, key, limit, meaning in HEALTH:
        lines = _two(run.log, [(part, measure(part, key)) for part in ("train", "test")])
        ends = [x for line in lines for x in line.x]
        if not ends:
            continue
        if limit is not None:
            lines.append(Line(meaning, [min(ends), max(ends)], [limit] * 2, "#d62728", dashed=True))
        figures.append(line_chart(f"{title} ({key})", lines, "epoch"))
    return section("Health of matching", "matching", el("div", *figures, class_="grid")) if figures else None


def classes(run: Run, found: EvalCurves | None) -> Html | None:
    """One row per class, sortable."""
    if not run.per_class:
        return None
    points = {str(point.category_id): point for point in found.points} if found else {}
    header = ["class", "objects", "AP", "AP50", "AR100"]
    header += ["best F1", "at score", "precision", "recall"] if points else []
    rows = []
    for entry in run.per_class:
        row: list[Any] = [entry["name"], int(entry["objects"])]
        row += [percent(float(entry[name])) for name in ("AP", "AP50", "AR100")]
        if points:
            point = points.get(entry["category_id"])
            score = point.threshold if point else -1.0
            row += [percent(point.F1 if point else None), (f"{score:.2f}" if score >= 0 else "-", score)]
            row += [percent(point.precision if point else None), percent(point.recall if point else None)]
        rows.append(row)
    hint = "In percent. A click on a header sorts."
    hint += " Precision and recall are at IoU 0.5 and at the score of the best F1 of the class." if points else ""
    inside = el("div", table(header, rows, sortable=True), class_="tall")
    return section("Classes", "classes", el("p", hint, class_="hint"), inside)


def precision_recall(found: EvalCurves) -> Html:
    """Curves of the means and of the classes."""
    pr = found.precision_recall
    means = (("IoU 0.5", pr.at_50), ("IoU 0.75", pr.at_75), ("IoU 0.5:0.95", pr.mean))
    x = RECALL.tolist()
    lines = [Line(f"{name}: AP {y.mean():.3f}", x, y.tolist(), COLORS[i]) for i, (name, y) in enumerate(means)]
    ranked = sorted(pr.classes, key=lambda name: -pr.classes[name].mean())
    named = ranked if len(ranked) <= NAMED else ranked[: NAMED // 2] + ranked[-(NAMED // 2) :]
    own = [Line("", x, pr.classes[name].tolist(), GREY) for name in ranked if name not in named]
    for rank, name in enumerate(named):
        y = pr.classes[name].tolist()
        own.append(Line(f"{name} {pr.classes[name].mean():.3f}", x, y, COLORS[rank]))
    title = "classes at IoU 0.5" + (f", the best and worst {NAMED // 2}" if len(named) < len(ranked) else "")
    figures = [
        line_chart(f"mean of {len(ranked)} classes", lines, "recall", y_range=(0, 1)),
        line_chart(title, own, "recall", y_range=(0, 1)),
    ]
    hint = el("p", "Precision (up) that is reached at a recall (right).", class_="hint")
    return section("Precision and recall", "precision", hint, el("div", *figures, class_="grid wide"))


def confusions(found: EvalCurves) -> Html:
    """The confusion matrix and the most frequent confusions."""
    matrix, mistaken = found.confusion, found.confusion.mistaken()
    hint = (
        f"Detections with a score of at least {matrix.threshold:g}, at IoU 0.5. Rows are the truth, columns what was "
        "detected. Background: a detection where no object is left. Missed: an object that nothing found."
    )
    rows = [(truth, predicted, count, percent(share)) for truth, predicted, count, share in mistaken[:LISTED]]
    header = ["truth", "detected as", "objects", "% of that class"]
    title = "Wrong classes" + (f", the {LISTED} most frequent of {len(mistaken)}" if len(mistaken) > LISTED else "")
    inside = table(header, rows, sortable=True) if rows else note("No object was taken for another class.")
    listed = el("div", el("h3", title), inside, class_="tall")
    if len(matrix.names) > MATRIX:
        shown = join([note(f"{len(matrix.names)} classes are too many for a picture; see eval/confusion.csv."), listed])
    else:
        shown = el("div", heat_map(matrix.names, matrix.counts), listed, class_="beside")
    return section("Confusion", "confusion", el("p", hint, class_="hint"), shown)


def files(run: Run, page: Path) -> Html:
    """Links to the files of the run, relative to the page."""
    present = [run.folder / name for name in TOP if (run.folder / name).is_file()]
    for pattern in ("*.pth", "eval/*", "eval_ema/*.csv", "pictures/overview.png"):
        present += sorted(path for path in run.folder.glob(pattern) if path.is_file())
    rows = []
    for path in present:
        link = quote(Path(os.path.relpath(path, page.parent)).as_posix())
        size = path.stat().st_size
        rows.append((el("a", path.relative_to(run.folder).as_posix(), href=link), (_bytes(size), size)))
    where = el("p", str(run.folder.resolve()), class_="hint")
    return section("Files", "files", where, table(["file", "size"], rows))


def _two(log: Sequence[Entry], readers: Sequence[tuple[str, Callable[[Entry], float | None]]]) -> list[Line]:
    """Return the lines of training and evaluation that have values."""
    lines = [Line(name, *curve(log, read), COLORS[i], dashed=i > 0) for i, (name, read) in enumerate(readers)]
    return [line for line in lines if line.x]


def _reader(key: str) -> Callable[[Entry], float | None]:
    return lambda entry: entry.get(key)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, str) and value else json.dumps(value)


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def remarks(lines: Sequence[str]) -> Html:
    """Return what is missing in this report."""
    return join(note(line) for line in lines if line)
