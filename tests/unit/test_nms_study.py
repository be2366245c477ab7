"""NMS as an option of evaluation, and the falsification test of hybrid matching that is built on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from main import main as train
from models.postprocess import PostProcessor
from tests.cli import flags
from util.boxes import inverse_sigmoid
from util.nms_study import Row, main, table, verdicts

HYBRID = "--with_box_refine --two_stage --num_queries_one2many 6 --k_one2many 2"


def detect(scores: list[list[float]], boxes: list[list[float]], **settings) -> list[tuple[float, int]]:
    """Return (score, label) of what is kept of one image, rounded."""
    logits = inverse_sigmoid(torch.tensor([scores]))
    (found,) = PostProcessor(**settings).select(logits, torch.tensor([boxes]), [(100, 100)], [0])
    return [(round(s, 3), c) for s, c in zip(found.scores.tolist(), found.labels.tolist())]


BOX, NEAR, FAR = [0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]  # IoU of the first two: 0.905


def test_without_a_threshold_doubles_are_kept() -> None:
    assert detect([[0.9], [0.8], [0.7]], [BOX, NEAR, FAR]) == [(0.9, 0), (0.8, 0), (0.7, 0)]


def test_nms_drops_the_worse_of_two_boxes_of_one_class() -> None:
    assert detect([[0.8], [0.9], [0.7]], [BOX, NEAR, FAR], nms_iou=0.7) == [(0.9, 0), (0.7, 0)]


def test_nms_keeps_boxes_below_its_iou_and_of_other_classes() -> None:
    assert len(detect([[0.8], [0.9]], [BOX, NEAR], nms_iou=0.95)) == 2
    kept = detect([[0.8, 0.1], [0.2, 0.9]], [BOX, NEAR], nms_iou=0.7)
    assert kept == [(0.9, 1), (0.8, 0)]


def test_nms_fills_the_best_detections_from_behind_the_doubles() -> None:
    assert detect([[0.9], [0.8], [0.7]], [BOX, NEAR, FAR], nms_iou=0.7, topk=2) == [(0.9, 0), (0.7, 0)]


def rows(one: tuple[float, float], many: tuple[float, float]) -> list[Row]:
    return [
        Row(group, iou, ap, 0.0, 0.0)
        for group, aps in (("one2one", one), ("one2many", many))
        for iou, ap in zip((0.0, 0.7), aps)
    ]


@pytest.mark.parametrize(
    ("one", "many", "holds"),
    [
        ((0.70, 0.704), (0.30, 0.70), [True, True]),
        ((0.70, 0.696), (0.30, 0.45), [True, True]),
        ((0.70, 0.71), (0.30, 0.70), [False, True]),
        ((0.70, 0.69), (0.30, 0.70), [False, True]),
        ((0.70, 0.70), (0.60, 0.70), [True, False]),
    ],
)
def test_the_claims_hold_or_fail_by_the_bounds_of_the_test(one, many, holds) -> None:
    assert [found for found, _ in verdicts(rows(one, many))] == holds


def test_the_table_has_a_row_for_every_group_and_threshold_in_percent() -> None:
    lines = table(rows((0.7, 0.704), (0.3, 0.7))).splitlines()
    assert lines[2:4] == ["| one2one | no | 70.0 | 0.0 | 0.0 |", "| one2one | IoU 0.7 | 70.4 | 0.0 | 0.0 |"]
    assert len(lines) == 6


def test_a_trained_checkpoint_is_studied_with_the_flags_of_its_preset(tmp_path: Path, capsys) -> None:
    assert train(flags(tmp_path / "run", f"{HYBRID} --epochs 1")) == 0
    words = flags(tmp_path / "study", f"{HYBRID} --resume {tmp_path / 'run' / 'checkpoint.pth'}")
    assert main(["main.py", *words]) in (0, 1)
    found = json.loads((tmp_path / "study" / "nms.json").read_text())
    assert [(row["group"], row["nms_iou"]) for row in found] == [
        ("one2one", 0.0),
        ("one2one", 0.7),
        ("one2many", 0.0),
        ("one2many", 0.7),
    ]
    assert (tmp_path / "study" / "nms.md").read_text().count("\n") == 6
    assert (tmp_path / "study" / "nms.png").stat().st_size > 1000
    assert f"outputs are in {tmp_path / 'study'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (HYBRID, "--resume CHECKPOINT"),
        ("--with_box_refine --resume some.pth", "those of the hybrid branch"),
    ],
)
def test_a_study_without_weights_or_without_a_second_group_says_what_to_give(more, message, tmp_path, capsys) -> None:
    assert main(flags(tmp_path, more)) == 2
    assert message in capsys.readouterr().err
