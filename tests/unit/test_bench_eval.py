"""The benchmark of evaluation: what it draws, what it compares, what it prints."""

from __future__ import annotations

import json

import numpy as np
import pytest

from datasets.eval_backends import BACKENDS, Evaluated
from tests.unit.eval_cases import packages
from util.bench_eval import CROWD, STAGES, difference, draw_detections, draw_truth, main, table

SMALL = "--images 6 --objects 3 --detections 12 --classes 4 --batch_size 4 --repeats 2".split()


def test_objects_and_detections_are_as_many_as_asked_for():
    truth = draw_truth(400, 6.6, 80, seed=0)
    annotations = truth.coco.dataset["annotations"]
    assert len(annotations) / 400 == pytest.approx(6.6, rel=0.05)
    assert np.mean([a["iscrowd"] for a in annotations]) == pytest.approx(CROWD, abs=0.01)
    batches = draw_detections(truth, 10, 64, seed=0)
    assert [len(found) for found, _ in batches] == [64] * 6 + [16]
    found = [one for part, _ in batches for one in part]
    assert {len(one.scores) for one in found} == {10}
    assert all((one.scores[:-1] >= one.scores[1:]).all() for one in found)
    assert all((one.boxes_px[:, 2:] > one.boxes_px[:, :2]).all() for one in found)


def test_the_same_seed_draws_the_same_and_another_does_not():
    drawn = []
    for seed in (1, 1, 2):
        truth = draw_truth(5, 3, 4, seed)
        ((found, _),) = draw_detections(truth, 3, 5, seed)
        drawn.append((truth.coco.dataset, [one.boxes_px.tolist() for one in found]))
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[2][0] and drawn[0][1] != drawn[2][1]


def evaluated(**changed) -> Evaluated:
    arrays = {"precision": np.zeros((1, 1)), "recall": np.zeros(1), "scores": np.zeros((1, 1))}
    return Evaluated(**{"stats": [0.5, -1.0], "category_ids": [1], **arrays, **changed})


def test_the_difference_is_the_largest_of_numbers_and_arrays():
    assert difference(evaluated(), evaluated()) == 0
    assert difference(evaluated(), evaluated(stats=[0.5, -0.75])) == 0.25
    assert difference(evaluated(), evaluated(scores=np.full((1, 1), 0.125))) == 0.125


def test_the_table_compares_processor_time_with_that_of_pycocotools():
    quick = {"truth": [0.1], "update": [0.2, 9.0, 0.3], "remaining": [0.1, 0.1, 0.1]}
    slow = {"truth": [0.1], "update": [1.0], "remaining": [5.0]}
    times = {
        name: {**own, "truth_cpu": [0.1], "update_cpu": [update], "remaining_cpu": [remaining]}
        for name, own, update, remaining in (("pycocotools", slow, 1.0, 5.0), ("hotcoco", quick, 0.2, 0.1))
    }
    results = {"pycocotools": evaluated(), "hotcoco": evaluated(stats=[0.5, -0.75])}
    first, second = table(times, results).splitlines()[2:]
    assert first.split(" | ")[4:] == ["6.000 (6.000)", "1.0", "- |"]
    assert second.split(" | ")[2:] == ["0.300 (0.200)", "0.100 (0.100)", "0.400 (0.300)", "20.0", "2e-01 |"]


def test_every_installed_package_is_measured_and_agrees(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--output_dir", str(tmp_path), "--output", str(file)]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    available = [name for name in packages() if isinstance(name, str)]
    assert sorted(line[0].removeprefix("| ") for line in lines) == sorted(available)
    saved = json.loads((tmp_path / "bench_eval.json").read_text())
    assert saved == json.loads(file.read_text())
    assert sorted(own["way"] for own in saved["figures"]) == sorted({*available} - {"pycocotools"})
    spent = [a + b for a, b in zip(*(saved["seconds"]["pycocotools"][f"{stage}_cpu"] for stage in STAGES))]
    assert all(own["plain"][1:] == pytest.approx([min(spent), max(spent)], rel=1e-3) for own in saved["figures"])
    assert all(len(own["update"]) == len(own["remaining_cpu"]) == 2 for own in saved["seconds"].values())
    for name in available:
        assert saved["stats"][name] == pytest.approx(saved["stats"]["pycocotools"], abs=1e-12)


def test_without_pycocotools_the_first_package_is_the_reference(capsys):
    assert main([*SMALL, "--evaluators", "pycocotools"]) == 0
    assert "pycocotools / this" in capsys.readouterr().out
    fast = [name for name in BACKENDS if name != "pycocotools" and name in packages()]
    if not fast:
        pytest.skip("pycocotools is the only package here")
    assert main([*SMALL, "--evaluators", fast[0]]) == 0
    assert f"{fast[0]} / this" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--images", "--repeats", "--batch_size"])
def test_a_number_that_cannot_be_measured_is_named(flag, capsys):
    assert main([*SMALL, flag, "0"]) == 2
    assert f"{flag} 0: must be at least 1" in capsys.readouterr().err
