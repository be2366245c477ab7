"""Flags of matchers that would change nothing are refused, and those that change something are not."""

from __future__ import annotations

from itertools import product

import pytest

from models import assign
from tests.tiny import TWO_STAGE, tiny_args
from util.arg_rules import check_args
from util.errors import UserError
from util.idle_flags import class_target, idle_flags

BRANCH = "--num_queries_one2many 12 --k_one2many 3"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--greedy_rounds 4", "nobody bids here; add --matcher cost-greedy"),
        (f"{BRANCH} --greedy_rounds 4", "nobody bids here; add --matcher cost-greedy"),
        ("--matcher soft --greedy_rounds 4", "nobody bids here; add --scg rounds"),
        ("--matcher soft --scg_switch 1 --greedy_rounds 4", "nobody bids here; add --scg rounds"),
        (f"--matcher soft {BRANCH} --one2many_groups isolated --greedy_rounds 4", "nobody bids here"),
        ("--matcher soft --num_queries_one2many 12 --k_one2many 0 --greedy_rounds 4", "nobody bids here"),
        (f"--matcher soft {TWO_STAGE} --enc_matcher soft --greedy_rounds 4", "nobody bids here"),
        ("--matcher soft --scg mutual --greedy_rounds 4", "--scg mutual has one round; add --scg rounds"),
        ("--matcher soft --soft_warmup none --soft_warmup_share 0.2", "add --soft_warmup prior or teacher"),
        ("--matcher soft-literal --soft_warmup_share 0.2", "--soft_warmup_share 0.2: there is no warm-up"),
        ("--matcher soft --scg rounds --scg_rho 0.3", "an object gets one query here"),
        ("--matcher soft --scg mutual --scg_rho 0.3", "an object gets one query here"),
        ("--matcher soft --scg_switch 0 --scg_rho 0.3", "an object gets one query here"),
        ("--matcher soft --scg rounds --scg_switch 0", "there from the start"),
        ("--matcher soft --scg rowpeak --soft_extra_layers 1", "keeps such pairs on every layer"),
        ("--matcher soft --no_aux_loss --soft_extra_layers 1", "leave out --no_aux_loss"),
        ("--corr_loss_coef 2", "--corr_loss_coef 2.0: nothing is learned here; add --matcher soft"),
        ("--matcher cost-greedy --corr_loss_coef 0", "--corr_loss_coef 0.0: nothing is learned here"),
        (f"{TWO_STAGE} --enc_matcher soft --soft_warmup teacher", "teaches decoder queries, not proposals"),
        (f"{TWO_STAGE} --enc_matcher soft --soft_extra_layers 1", "is about decoder layers, not proposals"),
    ],
)
def test_a_flag_that_changes_nothing_is_refused_with_the_way_out(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_args(tiny_args(flags))


@pytest.mark.parametrize(
    "flags",
    [
        "--matcher cost-greedy --greedy_rounds 4",
        f"--matcher soft {TWO_STAGE} --greedy_rounds 4",  # of the proposals
        "--matcher soft --scg rounds --greedy_rounds 4",
        "--matcher soft --scg_switch 0.7 --greedy_rounds 4",
        "--matcher soft --scg mutual --scg_switch 0.7 --greedy_rounds 4",
        f"--matcher soft {BRANCH} --greedy_rounds 4",
        "--matcher soft --hybrid epoch --hybrid_k 3 --greedy_rounds 4",
        "--matcher soft-literal --soft_warmup teacher --soft_warmup_share 0.2",
        "--matcher soft --soft_warmup_share 0.2",
        "--matcher soft --scg rounds --scg_rho 0.3 --soft_extra_layers 1",
        f"--matcher soft --scg rounds --scg_rho 0.3 {BRANCH}",
        "--matcher soft --scg_switch 0.7 --scg_rho 0.3",
        "--matcher soft --scg rounds --scg_switch 1",
        "--matcher soft --scg mutual --scg_switch 0.5",
        "--matcher soft --scg rowpeak --scg_switch 0.5 --soft_extra_layers 1",
        "--matcher soft --no_aux_loss --soft_extra_layers 2",  # the last of the two layers
        "--matcher soft --scg rounds --extra_cls positive",
        f"--matcher cost-greedy {TWO_STAGE} --enc_matcher soft --extra_cls positive --corr_loss_coef 2",
        "--matcher soft --corr_loss_coef 0.5",
    ],
)
def test_a_flag_that_changes_something_is_taken(flags: str) -> None:
    check_args(tiny_args(flags))


def test_every_idle_flag_has_a_message_that_names_it() -> None:
    args = tiny_args("--matcher soft --scg rounds --scg_rho 0.3 --scg_switch 0.2 --soft_warmup none")
    found = idle_flags(args)
    assert found.keys() == {"scg_rho", "scg_switch"}
    assert all(f"--{name}" in message for name, message in found.items())


def test_the_target_of_the_class_loss_is_that_of_the_models() -> None:
    targets = set()
    for matcher, scg, target in product(
        ("hungarian", "cost-greedy", "soft", "soft-literal"),
        (None, "colpeak", "rowpeak", "mutual", "rounds"),
        (None, "hard", "quality", "weight", "pairwise"),
    ):
        args = tiny_args(f"--matcher {matcher}")
        args.scg, args.cls_target = scg, target
        assert class_target(args) == assign.class_target(args)
        targets.add(class_target(args))
    assert targets == {"hard", "quality", "weight", "pairwise"}
