"""Flags of `main.py --export` and what does not go together with them."""

from __future__ import annotations

import argparse

Rules = list[tuple[bool, str]]

OPSETS = range(18, 24)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `util.export`."""
    group = parser.add_argument_group("export")
    group.add_argument(
        "--export",
        default="",
        choices=["", "onnx", "torch"],
        help="write the detector of --resume for other programs and stop: model.onnx, or model.pt2 of torch.export, "
        "and model.json that says how to feed it, in --output_dir; then compare the file with the model",
    )
    group.add_argument(
        "--export_size",
        nargs=2,
        type=int,
        default=None,
        metavar=("H", "W"),
        help="height and width of the canvas, pixels; images may be smaller (default: --test_size and --max_size)",
    )
    group.add_argument("--export_batch", default=1, type=int, help="images per call, where it is not dynamic")
    group.add_argument(
        "--export_dynamic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave the number of images, height and width open; both sides of the canvas are then multiples of the "
        "coarsest stride (64 with the usual four levels)",
    )
    group.add_argument("--export_opset", default=18, type=int, help="version of ONNX's operators, 18 to 23")
    group.add_argument(
        "--export_topk", default=0, type=int, help="detections per image; 0: as many as --topk of the training"
    )
    group.add_argument(
        "--export_images", nargs="+", default=[], metavar="FILE", help="compare with these images, not with drawn ones"
    )


def export_rules(a: argparse.Namespace) -> Rules:
    """Return (broken, message) of the flags of the export."""
    plain = {"size": None, "batch": 1, "dynamic": False, "opset": 18, "topk": 0, "images": []}
    changed = [f"--export_{n}" for n, value in plain.items() if getattr(a, f"export_{n}") != value]
    height, width = a.export_size or (1, 1)
    return [
        (bool(changed) and not a.export, f"{', '.join(changed)}: nothing is exported; add --export onnx or torch"),
        (
            bool(a.export) and (not a.resume or a.resume == "auto" or not a.output_dir),
            "--export needs --resume CHECKPOINT (a file) and --output_dir, where it writes",
        ),
        (
            bool(a.export) and bool(a.eval or a.analyse or a.strip),
            "--export only writes a file: leave out --eval, --analyse and --strip",
        ),
        (
            bool(a.export) and a.export_opset not in OPSETS,
            f"--export_opset {a.export_opset}: {OPSETS.start} to {OPSETS.stop - 1}",
        ),
        (a.export_batch < 1, f"--export_batch {a.export_batch}: must be at least 1"),
        (a.export_topk < 0, f"--export_topk {a.export_topk}: must be 0 or more"),
        (min(height, width) < 1, f"--export_size {height} {width}: sides must be at least 1 pixel"),
        (
            a.export_dynamic and a.export_batch != 1,
            "--export_dynamic leaves the number of images open: leave out --export_batch",
        ),
    ]
