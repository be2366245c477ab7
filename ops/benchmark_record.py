"""Where, when and with what a benchmark ran, and its figures in the form that the README is written from."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "pycocotools", "faster-coco-eval", "hotcoco")


def record() -> dict[str, Any]:
    """Return command line, date, machine and versions; call it first: the load is that before the benchmark's own."""
    script = Path(sys.argv[0])
    gpu = torch.cuda.is_available()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]]),
        "date": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
            "gpu": torch.cuda.get_device_name() if gpu else None,
            "system": platform.platform(),
        },
        "versions": versions | ({"cuda": torch.version.cuda} if gpu else {}),
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(values: Sequence[float]) -> list[float]:
    """Return median, least and largest number, four digits each: more would only make files longer."""
    return [shortened(statistics.median(values)), shortened(min(values)), shortened(max(values))]


def shortened(value: float) -> float:
    """Return the number rounded to four significant digits."""
    return float(f"{value:.4g}")


def compared(kind: str, case: dict[str, Any], plain: Sequence[float], ours: Sequence[float], **more: Any) -> dict:
    """Return the figure of a plain and of our way to do the same, which took turns.

    Args:
        kind: what is compared, "matching".
        case: sizes and types, as numbers and words.
        plain, ours: times of every repetition, in one unit.
        more: further entries, such as the names of the ways.
    """
    gains = [a / b for a, b in zip(plain, ours, strict=True)]
    return {
        "kind": kind,
        "case": case,
        "plain": spread(plain),
        "ours": spread(ours),
        "times_as_fast": spread(gains),
        **more,
    }
