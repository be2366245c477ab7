"""The benchmarks by name: `python util/benchmark.py NAME [flags]`; `NAME --help` lists the flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

BENCHMARKS = {
    "eval": ("util.bench_eval", "COCO's evaluation by each installed package: while images arrive, and after the last"),
    "loader": ("util.bench_loader", "images/s per core of the data loader, beside the way over PIL images"),
    "step": ("util.bench_train", "whole training steps of presets: images/s, memory, and where the time goes"),
    "matching": ("util.bench_matching", "Hungarian matching: the published way against ours, the solver against SciPy"),
    "all": (
        "util.bench_all",
        "every benchmark that README.md quotes, one after the other; goes on where it was cut off",
    ),
    "readme": ("util.bench_readme", "write the tables of README.md's section on speed from what `all` measured"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark that the first argument names; return what it returns, 2 for an unknown name."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in BENCHMARKS:
        return import_module(BENCHMARKS[name][0]).main(rest)
    print("usage: python util/benchmark.py NAME [flags]\n")
    print("\n".join(f"  {known:<12}{what}" for known, (_, what) in BENCHMARKS.items()))
    return 0 if name in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the folder of this file is not the root of the imports
    sys.exit(main())
