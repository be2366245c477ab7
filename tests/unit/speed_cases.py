"""Files as `util/benchmark.py all` writes them, with figures that can be checked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from util.bench_all import digest

MACHINE = {"processor": "Some CPU", "cores": 4, "load": 0.25, "gpu": None, "system": "Linux"}
OPERATOR = {"shape": "enc800", "mode": "forward", "dtype": "fp32", "device": "cpu", "threads": 1, "batch": 1}
OPERATOR |= {"dist": "model"}
STEP = {"preset": "h_detr/a.sh", "way": "", "size": [320, 320], "objects": 7, "repeats": 3, "threads": 2, "batch": 2}
STEP |= {"device": "cpu"}
MS = {"forward": 200, "criterion": 5, "matching": 2, "backward": 250, "update": 45}


def figure(kind: str, case: dict[str, Any], plain: float, ours: float, **more: Any) -> dict[str, Any]:
    """Return a comparison whose ratio spreads by half of it to either side."""
    gain = plain / ours
    spreads = {"plain": [plain] * 3, "ours": [ours] * 3, "times_as_fast": [gain, 0.5 * gain, 1.5 * gain]}
    return {"kind": kind, "case": case, **spreads, **more}


def step(**changed: Any) -> dict[str, Any]:
    """Return the row of a preset: 500 ms and 1.5 GiB, a quarter of it attention."""
    return {
        "kind": "step",
        "case": STEP | changed.pop("case", {}),
        **{"step": [500, 450, 650], "ms": MS, "memory": 3 * 2**29, "attention": 0.25},
        **changed,
    }


def write(folder: Path, name: str, command: str, figures: list[dict[str, Any]], **more: Any) -> None:
    """Write the file of one benchmark."""
    content = {"date": "2026-01-02 03:04", "machine": MACHINE, "versions": {"python": "3.11", "torch": "2.9"}}
    about = {"name": name, "command": f"python {command}", "device": "cpu", "quick": False, "git": "abcdef0123"}
    content |= {key: more.pop(key) for key in content.keys() & more.keys()}
    (folder / f"{name}.json").write_text(digest(content | {"figures": figures}, **{**about, **more}))


def write_one_of_each(folder: Path) -> None:
    """Write one file of every kind; some figures are of those that the README leaves out."""
    two = [
        figure("operator", OPERATOR | {"mode": mode}, 1048, 26.2, way="cpu avx2")
        for mode in ("forward", "forward+backward")
    ]
    hidden = figure("operator", OPERATOR | {"shape": "dec900", "dtype": "bf16"}, 3, 1, way="cpu avx2")
    half = figure("operator", OPERATOR | {"dtype": "bf16", "batch": 2, "dist": "uniform"}, 90, 60, way="cuda")
    write(folder, "operator", "ops/benchmark.py", [*two, hidden, half])
    layer = {key: value for key, value in OPERATOR.items() if key != "dist"} | {
        "mode": "forward+backward",
        "threads": 2,
    }
    write(folder, "layer", "ops/benchmark.py --what layer", [figure("layer", layer, 150, 120, kept=[2**21, 2**20])])
    sizes = {"batch": 16, "layers": 7, "device": "cpu", "threads": 1}
    names = ("step: 300 queries, 20 objects, trained", "step: 300 queries, 20 objects, scratch")
    solver = figure("matching", sizes | {"name": "solver: 1500 x 60, K = 6, trained", "batch": 8}, 30, 0.05)
    steps = [figure("matching", sizes | {"name": name}, 115, 10) for name in names]
    write(folder, "matching", "util/benchmark.py matching", [*steps, solver])
    write(folder, "loader", "util/benchmark.py loader", [figure("loader", {"data": ""}, 12.5, 4)])
    evaluated = figure("eval", {"images": 1000, "detections": 100}, 11.4, 0.114, way="hotcoco")
    write(folder, "eval", "util/benchmark.py eval", [evaluated])
    rows = [step(), step(case={"preset": "b/c.sh", "way": "--compile"}, step=[1000, 900, 1100], attention=0.004)]
    write(folder, "step", "util/benchmark.py step --batch_size 2", rows)
