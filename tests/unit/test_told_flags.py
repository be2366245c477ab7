"""What is said when a checkpoint is used with other flags than it was trained with."""

from __future__ import annotations

from util.args import get_args_parser
from util.told_flags import DETECTION, TRAINING, changes, on_eval

PLAIN = vars(get_args_parser().parse_args([]))


def test_every_told_flag_exists() -> None:
    assert not [flag for flag in (*DETECTION, *TRAINING) if flag not in PLAIN]


def test_the_same_flags_are_nothing_to_tell() -> None:
    assert on_eval(PLAIN, dict(PLAIN), "a.pth") == []


def test_a_flag_without_a_tensor_that_changes_detections_is_told_in_evaluation() -> None:
    trained = PLAIN | {"pe_temperature": 20.0, "pe_half_cell": False, "lr": 1.0}
    said = on_eval(trained, PLAIN, "a.pth")
    assert len(said) == 2
    assert said[0].startswith("warning: a.pth was trained with --pe_temperature 20.0, now it is --pe_temperature 10000")
    assert "trained with --no-pe_half_cell, now it is --pe_half_cell" in said[1]


def test_only_squares_among_augmentations_concern_evaluation() -> None:
    assert on_eval(PLAIN | {"augment": "flip", "lsj_size": 7}, PLAIN, "a.pth") == []
    (said,) = on_eval(PLAIN | {"augment": "lsj"}, PLAIN, "a.pth")
    assert "--augment lsj, now it is --augment detr" in said
    assert on_eval(PLAIN, PLAIN | {"augment": "lsj", "lsj_size": 7}, "a.pth") != []


def test_flags_that_a_published_file_does_not_know_are_not_compared() -> None:
    assert changes({"lr": 2.0}, {"lr": 1.0, "dn_number": 3}, ["lr", "dn_number"]) == [("lr", 2.0, 1.0)]
