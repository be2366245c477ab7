"""Every golden case in `--golden-dir` gives the published numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.runners import RUNNERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = Path(metafunc.config.getoption("--golden-dir"))
    cases = sorted(folder.glob("*.json"))
    if not cases:
        raise pytest.UsageError(f"--golden-dir {folder}: no case (*.json) in it")
    metafunc.parametrize("path", cases, ids=[c.stem for c in cases])


def test_case_gives_the_published_numbers(path: Path) -> None:
    meta = json.loads(path.read_text())
    kind = meta.get("case_kind")
    assert kind in RUNNERS, f"{path.name}: no runner for case_kind {kind!r}; there are {sorted(RUNNERS)}"
    arrays: dict[str, np.ndarray] = {}
    if path.with_suffix(".npz").exists():
        with np.load(path.with_suffix(".npz")) as stored:
            arrays = {key: stored[key] for key in stored.files}
    RUNNERS[kind](meta, arrays)
