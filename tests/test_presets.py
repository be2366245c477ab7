"""What the presets build makes a training step and detects: at full size once per backbone, else at a small one."""

from __future__ import annotations

from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import torch

from models import build_model
from tests.golden.runners import co_dino
from tests.test_configs import CONFIGS, PRESETS, flags_of, name_of, parsed
from tests.tiny import tiny_images, tiny_targets

FULL_SIZE = [CONFIGS / "bccd" / "r18_cpu.sh", *sorted((CONFIGS / "deformable_detr").glob("*.sh"))]
FULL_SIZE += [CONFIGS / "h_detr" / f"hybrid_{name}_36ep.sh" for name in ("r50", "swin_tiny", "swin_large")]
FULL_SIZE += [CONFIGS / "dab_dino" / f"{name}.sh" for name in ("dab_deformable_r50_50ep", "dino_5scale_r50_12ep")]
FULL_SIZE += [CONFIGS / "co_detr" / f"k2_{name}_12ep.sh" for name in ("swin_small", "swin_base", "swin_large")]
FULL_SIZE += [CONFIGS / "match_free" / "variants" / "soft.sh"]
SMALL = (
    "--backbone resnet18 --enc_layers 1 --dec_layers 2 --hybrid_layers 1 --hidden_dim 64 --dim_feedforward 96 "
    "--num_queries_one2one 30 --topk 100"
)
# Cells of the encoder, and so proposals of two stages: 639 at full size, 256 at the small one.
LARGE_IMAGES = [(160, 192), (121, 156)]
SMALL_IMAGES = [(96, 128), (80, 101)]

# What the other flags of a model differ in are numbers: sizes, rates, repeats.
SWITCHES = (
    "with_box_refine two_stage mixed_selection look_forward_twice dilation num_feature_levels "
    "hybrid one2many_own one2many_proposals one2many_groups eval_group eval_head query_pos matcher"
).split()


@cache
def args_of(preset: Path, more: str = "") -> Namespace:
    """Return the arguments of a preset for a model without a download; `more` flags win."""
    return parsed(flags_of(preset, *f"--backbone_weights none --num_classes 5 {more}".split()))


def structure_of(preset: Path) -> tuple[object, ...]:
    """Return what makes a model another one than that of the next preset, sizes aside."""
    args = args_of(preset)
    branch = args.num_queries_one2many > 0 and args.k_one2many > 0
    heads = (*args.aux_heads, args.lambda1 > 0, args.lambda2 > 0, args.aux_convs > 0)
    return (branch, args.nms_iou > 0, args.dn_number > 0, *heads, *(getattr(args, name) for name in SWITCHES))


def one_of_each_other_structure() -> list[Path]:
    chosen = {structure_of(preset): preset for preset in reversed(PRESETS)}
    for preset in FULL_SIZE:
        chosen.pop(structure_of(preset), None)
    return sorted(chosen.values())


def train_and_detect(args: Namespace, sizes: list[tuple[int, int]]) -> None:
    """Make one training step with two images of `sizes` (h, w), and detect in them."""
    model, criterion, postprocessor = build_model(args)
    images, targets = tiny_images(sizes), tiny_targets()
    output = model(images, targets)
    for name, found in output.sets.items():
        assert found.predictions.logits.shape[-2] > 0, f"set {name} has no queries at this image size"
    report = criterion(output, targets)
    report.total.backward()
    assert torch.isfinite(report.total)
    named = [*model.named_parameters(), *criterion.named_parameters()]  # a learned matcher has some too
    untouched = [n for n, p in named if p.requires_grad and p.grad is None]
    assert not untouched, f"parameters without a gradient would stop a distributed run: {untouched[:5]}"
    with torch.no_grad():
        output = model.eval()(images)
    detections = postprocessor(output, sizes, [1, 2])
    assert len(detections) == 2
    for found in detections:
        assert 0 < len(found.scores) <= args.topk
        every = args.nms_iou == args.soft_nms_iou == 0 and not args.eval_head  # else some may have dropped out
        assert not every or len(found.scores) == args.topk


@pytest.mark.parametrize("preset", FULL_SIZE, ids=name_of)
def test_preset_makes_a_training_step_at_full_size_and_detects(preset: Path) -> None:
    train_and_detect(args_of(preset), LARGE_IMAGES)


@pytest.mark.parametrize("preset", one_of_each_other_structure(), ids=name_of)
def test_every_other_structure_makes_a_training_step_and_detects(preset: Path) -> None:
    train_and_detect(args_of(preset, SMALL), SMALL_IMAGES)


def test_the_model_of_the_co_dino_presets_is_the_one_that_a_stored_case_checks() -> None:
    checked = vars(parsed(co_dino.FLAGS.split()))
    preset = vars(parsed(flags_of(CONFIGS / "co_detr" / "co_dino_5scale_r50_12ep.sh")))
    recipe = set("output_dir category_ids antialias lr_linear_proj_mult recipe_batch_size epochs lr_drop".split())
    assert {name for name, value in checked.items() if preset[name] != value} == recipe


def test_every_backbone_of_the_presets_is_built_at_full_size() -> None:
    assert {args_of(preset).backbone for preset in FULL_SIZE} == {args_of(preset).backbone for preset in PRESETS}
