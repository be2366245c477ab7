"""Flags of the two tests before a training: of the data (`--check_data`), and of one batch (`--overfit_batch`)."""

from __future__ import annotations

import argparse

IMAGE_CHECKS = ("none", "sizes", "decode")


def add_data_checks(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `--check_data` and `--overfit_batch`."""
    group = parser.add_argument_group("tests before a training")
    group.add_argument(
        "--check_data",
        action="store_true",
        help="report what is in the training and validation sets, what is wrong with them and what the loader makes of "
        "it, and stop; --output_dir gets pictures and data_report.json. Exit code 0: trainable, 1: not",
    )
    group.add_argument(
        "--check_images",
        default="sizes",
        choices=IMAGE_CHECKS,
        help="what --check_data looks at: none of the image files, sizes = their headers, or decode = all pixels",
    )
    group.add_argument("--check_samples", default=8, type=int, help="training samples that --check_data draws")
    group.add_argument(
        "--overfit_batch",
        action="store_true",
        help="train on one batch only, without augmentation, say PASS or FAIL and stop; --output_dir gets a picture. "
        "Exit code 0: its objects are detected, 1: they are not",
    )
    group.add_argument("--overfit_steps", default=500, type=int, help="most steps of --overfit_batch")


def data_check_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return (broken, what is wrong and the way out) for these flags."""
    given = [f"--{name}" for name in ("check_data", "overfit_batch") if getattr(a, name)]
    others = [f"--{name}" for name in ("strip", "eval", "analyse", "resume") if getattr(a, name)]
    return [
        (len(given) > 1, "--check_data and --overfit_batch are two things to do: give one of them"),
        (
            bool(given and others),
            f"{' '.join(given)} looks at the data before a training: leave out {' '.join(others)}",
        ),
        (a.check_samples < 0, f"--check_samples {a.check_samples}: must be 0 or more"),
        (a.overfit_steps < 1, f"--overfit_steps {a.overfit_steps}: must be at least 1"),
    ]
