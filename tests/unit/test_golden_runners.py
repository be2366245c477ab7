"""What the runners of the golden cases make of a case, where the stored cases do not show it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden.runners.common import assert_tied, parse_flags


@pytest.mark.parametrize(
    ("flags", "setting", "value"),
    [
        ({}, "aux_loss", True),
        ({"no_aux_loss": True}, "aux_loss", False),
        ({"no_aux_loss": False}, "aux_loss", True),
        ({"aux_loss": False}, "aux_loss", False),
        ({"aux_loss": True}, "aux_loss", True),
        ({"eval": False}, "eval", False),
        ({"two_stage": False}, "two_stage", False),
        ({"dilation": True}, "dilation", True),
        ({"num_queries": 30}, "num_queries_one2one", 30),
        ({"lambda_one2many": 1}, "lambda_one2many", 1.0),
        ({"lr_backbone_names": ["backbone.0", "neck"]}, "lr_backbone_names", ["backbone.0", "neck"]),
        ({"masks": False, "frozen_weights": None}, "num_queries_one2one", 300),
        ({"pretrained_backbone_path": "./swin.pkl"}, "backbone_weights", "none"),
    ],
)
def test_flags_of_a_case_become_arguments(flags: dict, setting: str, value: object) -> None:
    assert getattr(parse_flags(flags), setting) == value


def test_the_defaults_of_the_family_hold_where_a_case_does_not_set_them() -> None:
    assert parse_flags({}).dim_feedforward == 1024
    assert parse_flags({}, "H-Deformable-DETR").dim_feedforward == 2048
    assert parse_flags({"dim_feedforward": 256}, "H-Deformable-DETR").dim_feedforward == 256


@pytest.mark.parametrize("flags", [{"masks": True}, {"no_such_flag": 3}, {"no_such_flag": False}])
def test_a_flag_that_we_do_not_have_fails_the_case(flags: dict) -> None:
    with pytest.raises(SystemExit):
        parse_flags(flags)


def test_other_pairs_are_accepted_only_at_equal_cost() -> None:
    cost = np.array([[1.0, 5.0], [1.0, 5.0], [9.0, 2.0]])
    stored = np.array([[0, 2], [0, 1]])
    assert_tied("tie", cost, np.array([[1, 2], [0, 1]]), stored)
    assert_tied("a repeated target", cost, np.array([[1, 2], [2, 1]]), stored)
    with pytest.raises(AssertionError, match=r"cost 6\.0+ instead of 3\.0+"):
        assert_tied("dearer", cost, np.array([[0, 1], [0, 1]]), stored)
    with pytest.raises(AssertionError, match="1 pairs, stored 2"):
        assert_tied("fewer", cost, np.array([[2], [1]]), stored)
