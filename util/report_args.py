"""Flags of what people look at: curves of runs, reports, curves of evaluations."""

from __future__ import annotations

import argparse

SWITCH = argparse.BooleanOptionalAction


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Add the commands `--plot` and `--report` and the flags of evaluation curves."""
    group = parser.add_argument_group("curves and reports")
    group.add_argument(
        "--plot",
        default=[],
        nargs="+",
        metavar="RUN",
        help="draw the training curves of these output folders in the same pictures, into --output_dir, and stop",
    )
    group.add_argument(
        "--report",
        default="",
        metavar="RUN",
        help="write RUN/report.html, a page about this output folder that opens in any browser, and stop",
    )
    group.add_argument(
        "--report_images", default=6, type=int, help="best and worst images in the report, so many of each; 0: none"
    )
    group.add_argument(
        "--eval_curves",
        action=SWITCH,
        default=True,
        help="after --eval and the last epoch: precision-recall curves, best thresholds and confusion matrix in eval/",
    )
    group.add_argument(
        "--confusion_score",
        default=None,
        type=float,
        help="least score of a detection in the confusion matrix (default: the one of the best mean F1)",
    )


def report_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return the combinations that cannot work: (broken, what is wrong and the way out)."""
    flag = "--plot" if a.plot else f"--report {a.report}"
    score = a.confusion_score
    return [
        (
            bool(a.plot or a.report) and bool(a.eval or a.analyse or a.resume or a.strip),
            f"{flag} only reads finished output folders: leave out --eval, --analyse, --resume and --strip",
        ),
        (bool(a.plot) and bool(a.report), "--plot and --report are two commands: give one of them"),
        (
            len(a.plot) > 1 and not a.output_dir,
            "--plot draws several runs into one folder: say with --output_dir where the pictures go",
        ),
        (a.report_images < 0, f"--report_images {a.report_images}: must be 0 or more"),
        (score is not None and not 0 <= score <= 1, f"--confusion_score {score}: a score, 0 to 1"),
        (
            score is not None and not a.eval_curves,
            "--confusion_score is for the confusion matrix: leave out --no-eval_curves",
        ),
    ]
