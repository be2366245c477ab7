"""Files of DAB and DINO: evaluated without training parts, stripped, continued with other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import build_criterion, build_detector
from models.heads import heads_of
from tests.tiny import tiny_args, tiny_images, tiny_targets
from util.checkpoint import init_from, load_weights
from util.strip import strip

BOXES = "--with_box_refine --query_pos box"
DINO = f"{BOXES} --two_stage --mixed_selection --look_forward_twice --decoder_norm --dn_number 10"
BRANCH = "--num_queries_one2many 6 --k_one2many 2"
TABLES = {f"{DINO} {BRANCH}": ["transformer.tgt_embed.weight"], f"{BOXES} {BRANCH}": ["tgt_embed", "refpoint_embed"]}


@pytest.mark.parametrize("flags", TABLES)
def test_a_model_trained_with_the_hybrid_branch_is_evaluated_without_it(flags: str) -> None:
    trained = build_detector(tiny_args(flags)).eval()
    alone = build_detector(tiny_args(f"{flags} --eval --resume x")).eval()
    report = load_weights(alone, {"model": trained.state_dict()})
    for table in TABLES[flags]:
        assert any(line.startswith(table) and "took the first 8 of 14 rows" in line for line in report.lines)
    images = tiny_images([(96, 128), (80, 101)])
    with torch.no_grad():
        assert torch.equal(alone(images).pred_boxes, trained(images).pred_boxes)


@pytest.mark.parametrize("flags", TABLES)
def test_a_stripped_file_holds_no_part_or_row_that_only_training_needs(flags: str) -> None:
    trained = build_detector(tiny_args(flags)).eval()
    content = {"model": trained.state_dict(), "args": {"num_queries_one2one": 8}}
    stripped, gone = strip(content, "file.pth")
    assert not [name for name in stripped["model"] if name.startswith(("groups.", "label_enc."))]
    assert ("label_enc.*" in gone) == ("--dn_number" in flags)
    alone = build_detector(tiny_args(f"{flags} --eval --resume x"))
    assert load_weights(alone, stripped).fits


@pytest.mark.parametrize("share", ["--share_heads", ""])
def test_class_rows_of_another_dino_are_taken_by_name(share: str, tmp_path: Path) -> None:
    theirs = build_detector(tiny_args(f"{DINO} {share} --num_classes 5"))
    torch.save({"model": theirs.state_dict(), "class_names": list("abcde")}, tmp_path / "file.pth")
    ours = build_detector(tiny_args(f"{DINO} {share} --num_classes 3"))
    _, copied = init_from(ours, str(tmp_path / "file.pth"), list("cxa"), copy_class_rows=True)
    assert copied == ["c", "a"]
    names = [
        "transformer.enc_out_class_embed.weight",
        "label_enc.weight",
        "class_embed.0.weight",
        "class_embed.1.weight",
    ]
    found, given = ours.state_dict(), theirs.state_dict()
    for name in names:
        assert torch.equal(found[name][0], given[name][2]) and torch.equal(found[name][2], given[name][0]), name
        assert not any(torch.equal(found[name][1], row) for row in given[name]), f"{name}: x is not in the file"


@pytest.mark.parametrize(
    "flags",
    [
        "--matcher soft --enc_matcher soft --probe_per_layer",
        "--matcher soft --enc_matcher soft --probe_per_layer --no_aux_loss",
        "--matcher hungarian --enc_matcher soft --probe_per_layer",
        "--matcher soft --enc_matcher soft --soft_extra_layers 1",
    ],
)
def test_proposals_of_dino_have_the_probe_of_the_encoder(flags: str) -> None:
    args = tiny_args(f"{DINO} {flags}")
    model, criterion = build_detector(args), build_criterion(args)
    targets = tiny_targets()
    criterion(model(tiny_images([(96, 128), (80, 101)]), targets), targets, 0.0).total.backward()
    gradients = {name: p.grad for name, p in criterion.named_parameters() if "encoder" in name}
    if "--probe_per_layer" in flags:
        assert any(g.abs().sum() > 0 for g in gradients.values())
    assert all(p.grad is not None for p in criterion.parameters())


def test_a_shared_head_does_not_shrink_its_boxes_in_every_layer() -> None:
    shared = heads_of(width=8, num_classes=2, dec_layers=3, refine=True, two_stage=False, share=True)
    own = heads_of(width=8, num_classes=2, dec_layers=3, refine=True, two_stage=False)
    assert (shared.bbox_embed[0].layers[-1].bias == 0).all()
    assert own.bbox_embed[0].layers[-1].bias.tolist() == [0, 0, -2, -2]
    assert (own.bbox_embed[1].layers[-1].bias == 0).all()
