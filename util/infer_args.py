"""The flags of `main.py --infer`: a trained detector on images and videos that nobody annotated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from util.errors import UserError

SWITCH = argparse.BooleanOptionalAction

# Flags that say how a model is used, not what it is: those on the command line win over those in the checkpoint.
USE_FLAGS = (
    "topk nms_iou soft_nms_iou clip_boxes eval_group eval_head test_size max_size antialias augment lsj_size".split()
)


def add_infer(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`."""
    group = parser.add_argument_group(
        "inference (--infer)",
        "The model is built as its checkpoint says; flags of the model are needed only for files that do not say them. "
        f"Of the others, those given here win over the checkpoint: {' '.join('--' + name for name in USE_FLAGS)}.",
    )
    group.add_argument(
        "--infer",
        nargs="+",
        default=[],
        metavar="PATH",
        help="detect objects with --resume in images, folders (their images, those in subfolders too), quoted patterns "
        "as 'a/*.jpg' and videos (pip install av), write OUTPUT_DIR/detections.json, images.json, pictures/ and "
        "videos/, and stop",
    )
    group.add_argument(
        "--score_threshold",
        nargs="+",
        default=["0.3"],
        metavar="[CLASS=]SCORE",
        help="lowest score of a detection; CLASS=SCORE for one class, for example 0.3 cat=0.5; for AP of "
        "detections.json give 0",
    )
    group.add_argument("--infer_classes", nargs="+", default=[], metavar="NAME", help="only these classes; else all")
    group.add_argument(
        "--infer_batch_size",
        default=1,
        type=int,
        help="images at once; more are faster on a GPU, but padding changes scores a little, as in evaluation",
    )
    group.add_argument("--infer_csv", action=SWITCH, default=False, help="write OUTPUT_DIR/detections.csv too")
    group.add_argument("--infer_draw", action=SWITCH, default=True, help="write pictures and videos with boxes")


def infer_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return what cannot work, as `util.arg_rules.check_args` lists it: (broken, what is wrong and the way out)."""
    if not a.infer:
        return []
    others = [f"--{name}" for name in ("eval", "analyse", "strip", "init_from") if getattr(a, name)]
    try:
        thresholds(a.score_threshold)
        wrong = ""
    except UserError as error:
        wrong = str(error)
    return [
        (not a.resume, "--infer needs --resume CHECKPOINT: the detector to use"),
        (a.resume == "auto", "--resume auto continues a training; for --infer name the checkpoint itself"),
        (not a.output_dir, "--infer needs --output_dir FOLDER for what it finds"),
        (bool(others), f"--infer and {', '.join(others)} are different things to do: give one of them"),
        (a.infer_batch_size < 1, f"--infer_batch_size {a.infer_batch_size}: must be at least 1"),
        (bool(wrong), wrong),
    ]


def thresholds(values: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Return the score threshold of most classes and that of some by name, of texts as "0.3" and "cat=0.5".

    Raises:
        UserError: not a number, none of 0..1, or two for all classes.
    """
    general, named = [], {}
    for text in values:
        name, equals, number = text.rpartition("=")
        try:
            score = float(number)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1 or (equals and not name):
            raise UserError(f"--score_threshold {text}: a score of 0 to 1, or CLASS=SCORE as cat=0.5")
        if equals:
            named[name] = score
        else:
            general.append(score)
    if len(general) > 1:
        raise UserError(f"--score_threshold {' '.join(values)}: one score for all classes, others as CLASS=SCORE")
    return (general or [0.3])[0], named


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> frozenset[str]:
    """Return the names of the flags that stand on the command line, whatever their values are.

    Args:
        parser: of the command line.
        argv: the arguments; None: those of this program.
    """
    absent = object()
    before = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), absent))
    return frozenset(name for name, value in vars(parser.parse_args(argv, before)).items() if value is not absent)
