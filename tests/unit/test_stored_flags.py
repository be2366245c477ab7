"""What files say about their model: all of it in ours, enough in published ones."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest
import torch

from models.backbones import backbone_stages
from tests.conftest import CASES, ROOT
from tests.test_configs import flags_of as flags_of_preset
from tests.test_configs import parsed
from tests.unit.infer_cases import published
from util.args import get_args_parser
from util.convert import to_native
from util.errors import UserError
from util.infer_args import given_flags
from util.stored_flags import MODEL_FLAGS, flags_of, with_flags_of

# Golden case with the names and shapes of a published file, and the preset that evaluates it.
FILES = {
    "ddetr_base": "deformable_detr/r50",
    "ddetr_single_scale": "deformable_detr/single_scale",
    "ddetr_single_scale_dc5": "deformable_detr/single_scale_dc5",
    "ddetr_refine": "deformable_detr/refine",
    "ddetr_two_stage": "deformable_detr/two_stage",
    "hdetr_baseline": "h_detr/baseline_r50_12ep",
    "hdetr_r50_hybrid_official": "h_detr/tricks_r50_12ep",
}
BOX = {"num_select": 300, "num_patterns": 0, "pe_temperatureH": 20, "query_dim": 4}
DINO = BOX | {"num_queries": 900, "dn_number": 100, "two_stage_type": "standard", "return_interm_indices": [1, 2, 3]}
RELEASED = {
    "dab_deformable_r50": ("dab_dino/dab_deformable_r50_50ep", BOX),
    "dino_4scale_r50": ("dab_dino/dino_4scale_r50_12ep", DINO),
    "dino_5scale_r50": ("dab_dino/dino_5scale_r50_36ep", DINO | {"return_interm_indices": [0, 1, 2, 3]}),
    "dino_4scale_swin_l": ("dab_dino/dino_4scale_swin_large_12ep", DINO | {"backbone": "swin_L_384_22k"}),
}


def shapes(tensors: list) -> dict[str, torch.Tensor]:
    """Return tensors without content, by name."""
    return to_native({name: torch.empty(shape, device="meta") for name, shape, *_ in tensors})


def same_model(found: Namespace, preset: str) -> None:
    """Compare the flags with those of a preset: all that a model for COCO is built with."""
    expected = parsed(flags_of_preset(ROOT / "configs" / f"{preset}.sh"))
    expected.num_classes = 91
    for flags in (found, expected):
        flags.return_interm_indices = backbone_stages(flags)
    assert {n: getattr(found, n) for n in MODEL_FLAGS} == {n: getattr(expected, n) for n in MODEL_FLAGS}


@pytest.mark.parametrize("name", FILES)
def test_files_of_deformable_detr_and_h_detr_give_the_flags_of_their_preset(name: str) -> None:
    meta = json.loads((CASES / f"{name}.json").read_text())
    queries = {"num_queries": meta["flags"].get("num_queries_one2one", 300)}
    found = flags_of({"args": published(**queries | meta["flags"])}, shapes(meta["checkpoint"]))
    found.num_queries_one2one = 300 if name == "hdetr_baseline" else found.num_queries_one2one
    same_model(found, FILES[name])


@pytest.mark.parametrize("name", RELEASED)
def test_files_of_dab_and_dino_give_the_flags_of_their_preset(name: str) -> None:
    released = json.loads((CASES / "dino_checkpoint_names.json").read_text())["models"][name]
    preset, args = RELEASED[name]
    state = shapes(released["tensors"])
    state |= {name: state[target] for name, target in released["aliases"].items()}
    found = flags_of({"args": published(**args)}, state)
    same_model(found, preset)
    assert found.topk == 300


def test_a_file_that_says_too_little_gives_no_flags() -> None:
    assert flags_of({}, {}) is None
    assert flags_of({"args": Namespace(lr=1e-4, nheads=8)}, {}) is None
    assert flags_of({"format": 1, "args": {}}, {}) is None


def test_our_files_give_their_flags_and_unknown_ones_are_left_out() -> None:
    found = flags_of({"format": 1, "args": {"hidden_dim": 64, "flag_of_a_fork": 3}}, {})
    assert found.hidden_dim == 64 and found.nheads == 8 and not hasattr(found, "flag_of_a_fork")


def taken(words: str, content: dict, capsys: pytest.CaptureFixture[str]) -> tuple[Namespace, str]:
    parser = get_args_parser()
    content = content | {"model": {"transformer.level_embed": torch.zeros(4, 64)}}
    args = with_flags_of(parser.parse_args(words.split()), given_flags(parser, words.split()), content, "x.pth")
    return args, capsys.readouterr().out


def test_an_evaluation_takes_the_flags_of_the_model_that_were_not_given_from_the_file(capsys) -> None:
    stored = {"hidden_dim": 64, "nheads": 4, "two_stage": True, "with_box_refine": True, "num_classes": 7, "lr": 1.0}
    args, said = taken("--eval --resume x.pth --nheads 2", {"format": 1, "args": stored}, capsys)
    assert (args.hidden_dim, args.nheads, args.two_stage, args.with_box_refine) == (64, 2, True, True)
    assert args.num_classes is None and args.lr == 2e-4  # the data's, and none of the detector's
    assert said == "from x.pth: --two_stage --with_box_refine --hidden_dim 64\n"


def test_nothing_is_said_where_the_command_line_says_the_same(capsys) -> None:
    content = {"format": 1, "args": {"hidden_dim": 64}}
    args, said = taken("--eval --resume x.pth --hidden_dim 64", content, capsys)
    assert args.hidden_dim == 64 and said == ""


def test_given_flags_that_the_model_of_the_file_cannot_have_are_refused(capsys) -> None:
    content = {"format": 1, "args": {"two_stage": True, "with_box_refine": True}}
    with pytest.raises(UserError, match="two_stage"):
        taken("--eval --resume x.pth --no-with_box_refine", content, capsys)


def test_a_file_that_says_too_little_leaves_the_command_line_as_it_is(capsys) -> None:
    args, said = taken("--eval --resume x.pth", {}, capsys)
    assert vars(args) == vars(get_args_parser().parse_args("--eval --resume x.pth".split())) and said == ""
