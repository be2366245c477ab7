"""A page about a run that opens in any browser without a server: `main.py --report RUN` writes `RUN/report.html`.

The page is a single file. Its charts are drawn by `charts.py`, so it needs no matplotlib; the images with the best and
the worst detections need the data set that the run was evaluated on.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from datasets.evaluators import METRICS
from util import dist
from util.errors import UserError
from util.report import sections
from util.report.facts import Evaluated, Run, read_evaluation, read_run
from util.report.html import Html, el
from util.report.images import images
from util.report.page import page

__all__ = ["report_command", "write_report"]


def report_command(args: Namespace) -> None:
    """Run `main.py --report RUN [--report_images N] [--output_dir DIR]`."""
    folder = Path(args.output_dir or args.report)
    path = write_report(Path(args.report), folder / "report.html", images_of_each=args.report_images)
    dist.info(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def write_report(run_folder: Path, path: Path, *, images_of_each: int = 6) -> Path:
    """Write the page about an output folder.

    Args:
        run_folder: of a training, or of an evaluation (`--eval`).
        path: the file that is written.
        images_of_each: best and worst images that are shown; 0: none.

    Returns:
        `path`.

    Raises:
        UserError: no such folder, or neither a log nor an evaluation in it; the page cannot be written.
    """
    run = read_run(run_folder)
    content = _page(run, read_evaluation(run), path, images_of_each)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); give another folder with --output_dir") from error
    return path


def _page(run: Run, found: Evaluated, path: Path, count: int) -> str:
    curves = found.curves
    parts: dict[str, Html | None] = {
        "Results": sections.numbers(run),
        "Training": sections.curves(run) if run.log else None,
        "Matching": sections.health(run),
        "Classes": sections.classes(run, curves),
        "Precision": sections.precision_recall(curves) if curves else None,
        "Confusion": sections.confusions(curves) if curves else None,
        "Images": images(found, count) if found.dataset is not None and count else None,
        "Settings": sections.settings(run),
        "Files": sections.files(run, path),
    }
    missing = sections.remarks([*run.remarks, found.remark])
    parts["Results"] = el("div", missing, parts["Results"]) if missing else parts["Results"]
    made = f"Written {time.strftime('%Y-%m-%d %H:%M')} by main.py --report."
    where = el("p", str(run.folder.resolve()))
    name = run.folder.resolve().name
    return page(name, where, _tiles(run), {word: part for word, part in parts.items() if part is not None}, made)


def _tiles(run: Run) -> list[tuple[str, str]]:
    """Return the most important numbers and what they are."""
    tiles = []
    for name in ("AP", "AP50", "AP75", "AR100"):
        value = run.stats.get(name, -1.0)
        if name in METRICS and value >= 0:
            tiles.append((f"{100 * value:.1f}", name))
    last: dict[str, Any] = run.log[-1] if run.log else {}
    if run.log:
        wanted = (run.args or {}).get("epochs")
        tiles.append((str(last["epoch"] + 1), f"of {wanted} epochs" if wanted else "epochs"))
    seconds = sum(entry.get("train_epoch_time", 0.0) for entry in run.log)
    if seconds:
        tiles.append((_duration(seconds), "of training"))
    if last.get("n_parameters"):
        tiles.append((f"{last['n_parameters'] / 1e6:.1f} M", "parameters"))
    if run.stats.get("images"):
        tiles.append((str(run.stats["images"]), "evaluated images"))
    return tiles


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )
