"""The flags of `main.py` that change how fast it computes, and nothing that it computes."""

from __future__ import annotations

import argparse

SWITCH = argparse.BooleanOptionalAction


def add_speed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speed", "Results change by rounding only.")
    group.add_argument(
        "--compile",
        action=SWITCH,
        default=False,
        help="torch.compile for backbone, encoder and decoder layers, in training, evaluation and inference; the first "
        "steps take minutes. Needs a C++ compiler, on a GPU Triton",
    )
    group.add_argument(
        "--channels_last",
        action=SWITCH,
        default=False,
        help="the backbone keeps the channels of a pixel side by side, the layout that convolutions with --amp prefer",
    )
