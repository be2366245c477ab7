"""Flags of `main.py --convert_data`."""

from __future__ import annotations

import argparse

FORMATS = ("voc", "yolo")


def add_convert_data(parser: argparse.ArgumentParser) -> None:
    """Add the flags that turn other annotation formats into COCO's."""
    group = parser.add_argument_group("other annotation formats")
    group.add_argument(
        "--convert_data",
        nargs=2,
        default=[],
        metavar=("FORMAT", "SRC"),
        help="write the annotations of the folder SRC, Pascal VOC (voc) or YOLO (yolo), as OUTPUT_DIR/instances_*.json "
        "in COCO's format, and stop; images stay where they are",
    )
    group.add_argument(
        "--class_names",
        default="",
        metavar="FILE",
        help="text file with a class name per line, in the order of the classes; not given: those of data.yaml or "
        "classes.txt (yolo), or those that occur, sorted (voc)",
    )
    group.add_argument(
        "--keep_difficult",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="voc: train and evaluate on difficult objects too; they are written as crowd otherwise: neither asked for "
        "nor wrong",
    )
    group.add_argument(
        "--voc_first_pixel",
        default=1,
        type=int,
        choices=[0, 1],
        help="voc: 1: corners are the first and last pixel inside a box, counted from 1, as VOC says; 0: corners are "
        "edges counted from 0, as some programs write",
    )


def convert_data_rules(a: argparse.Namespace) -> list[tuple[bool, str]]:
    """Return what cannot work, as `util.arg_rules.check_args` lists it: (broken, what is wrong and the way out)."""
    kind = a.convert_data[0] if a.convert_data else ""
    return [
        (bool(kind) and kind not in FORMATS, f"--convert_data {kind}: the formats are {' and '.join(FORMATS)}"),
        (bool(kind) and not a.output_dir, "--convert_data needs --output_dir: the folder for the new files"),
        (not kind and bool(a.class_names), "--class_names belongs to --convert_data FORMAT SRC: add it"),
        (
            kind != "voc" and (a.keep_difficult or a.voc_first_pixel != 1),
            "--keep_difficult and --voc_first_pixel belong to --convert_data voc SRC: add it, or leave them out",
        ),
        (
            bool(kind) and bool(a.eval or a.analyse or a.resume or a.strip),
            "--convert_data only writes files: leave out --eval, --analyse, --resume and --strip",
        ),
    ]
