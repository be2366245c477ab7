"""Flags of boxes as queries and of denoising that cannot work are refused with the way out."""

import pytest

from main import get_args_parser
from util.arg_rules import check_args
from util.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--query_scale", "--query_scale True: for queries that are boxes; add --query_pos box"),
        ("--query_pos box", "--query_pos box needs --with_box_refine"),
        (
            "--query_pos box --with_box_refine --two_stage --num_patterns 3",
            "are for learned boxes: leave out --two_stage, or them",
        ),
        ("--dn_number 100", "noised boxes are queries only with --query_pos box; add it"),
        ("--dn_number -1", "--dn_number -1: must be 0 or more"),
        ("--dn_label_noise_ratio 3", "--dn_label_noise_ratio 3.0: 0 to 2"),
        ("--dn_box_noise_scale -1", "must be 0 or more"),
        ("--dn_groups divided --dn_box_noise_scale 0.4", "--dn_box_noise_scale 0.4, --dn_groups divided: there is no"),
        ("--num_classes 5 --dn_labelbook_size 3", "a row for each of the 5 classes"),
        ("--logit_eps 0", "--logit_eps 0.0: must be between 0 and 0.5"),
        ("--giou_eps -1", "--giou_eps -1.0: must be 0 or more"),
        ("--pe_temperature 0", "--pe_temperature 0.0: must be above 0"),
        ("--return_interm_indices 3 1", "ascending numbers of 0"),
        ("--return_interm_indices 1 3 --num_feature_levels 3 --aux_heads atss", "--aux_heads need all maps up to"),
        ("--return_interm_indices 2 --num_feature_levels 1 --aux_heads atss", "--aux_heads need all maps up to"),
        (
            "--query_pos box --with_box_refine --num_patterns 3 --num_queries_one2many 6 --k_one2many 2 "
            "--one2many_groups isolated",
            "--num_patterns multiplies the queries",
        ),
        ("--return_interm_indices 0 1 2 3 --num_feature_levels 3", "more maps than --num_feature_levels 3"),
    ],
)
def test_flags_that_cannot_work_say_the_way_out(flags: str, message: str) -> None:
    args = get_args_parser().parse_args(flags.split())
    with pytest.raises(UserError, match="this command line cannot work") as error:
        check_args(args)
    assert message in str(error.value)


def test_the_flags_of_dino_are_accepted() -> None:
    flags = "--query_pos box --with_box_refine --two_stage --mixed_selection --dn_number 100 --dn_labelbook_size 91"
    check_args(get_args_parser().parse_args([*flags.split(), "--num_classes", "91"]))


def test_a_preset_with_denoising_is_evaluated_without_it() -> None:
    flags = "--query_pos box --with_box_refine --dn_number 0 --dn_groups divided --eval --resume x.pth"
    check_args(get_args_parser().parse_args(flags.split()))
