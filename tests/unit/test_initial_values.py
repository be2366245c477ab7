"""Initial values of DAB-Deformable-DETR and DINO, row by row of their specification."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from models import build_model
from tests.tiny import tiny_args
from util.boxes import inverse_sigmoid

WIDTH, FEEDFORWARD, CLASSES, QUERIES = 32, 64, 5, 40
SIZES = f"--hidden_dim {WIDTH} --dim_feedforward {FEEDFORWARD} --nheads 4 --num_classes {CLASSES} --with_box_refine "
SIZES += f"--enc_layers 2 --dec_layers 3 --num_queries_one2one {QUERIES} --query_pos box "
DAB = SIZES + "--query_scale"
DINO = SIZES + "--two_stage --mixed_selection --look_forward_twice --decoder_norm --share_heads --dn_number 100"


def state_of(flags: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return build_model(tiny_args(flags))[0].state_dict()


@pytest.fixture(scope="module")
def dino() -> dict[str, Tensor]:
    return state_of(DINO)


@pytest.fixture(scope="module")
def dab() -> dict[str, Tensor]:
    return state_of(DAB)


def is_uniform(values: Tensor, bound: float) -> bool:
    """Say whether values fill [-bound, bound] as a uniform draw does: none beyond, and the standard deviation fits."""
    near = abs(values.std().item() * math.sqrt(3) / bound - 1) < 8 / math.sqrt(values.numel())
    return bool(values.abs().max() <= bound) and near


def is_xavier(weight: Tensor) -> bool:
    outputs, inputs = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
    return is_uniform(weight, math.sqrt(6 / (inputs + outputs)))


def is_default(weight: Tensor) -> bool:
    """Say whether a linear layer's weight or bias is as PyTorch draws it, over the inputs of the weight."""
    return is_uniform(weight, 1 / math.sqrt(weight.shape[-1]))


def is_standard_normal(weight: Tensor) -> bool:
    return abs(weight.std().item() - 1) < 4 / math.sqrt(weight.numel()) and weight.abs().max() > 1.5


@pytest.mark.parametrize(
    "name",
    [
        "transformer.encoder.layers.1.linear1.weight",
        "transformer.decoder.layers.0.linear2.weight",
        "transformer.decoder.layers.2.self_attn.in_proj_weight",
        "transformer.decoder.layers.2.self_attn.out_proj.weight",
        "transformer.encoder.layers.0.self_attn.value_proj.weight",
        "transformer.decoder.layers.1.cross_attn.output_proj.weight",
        "transformer.decoder.ref_point_head.layers.0.weight",
        "transformer.enc_output.weight",
        "transformer.tgt_embed.weight",
        "input_proj.0.0.weight",
        "input_proj.3.0.weight",  # the 3x3 convolution of the extra level
    ],
)
def test_matrices_of_the_transformer_and_the_neck_are_xavier(dino: dict[str, Tensor], name: str) -> None:
    assert is_xavier(dino[name])


def test_dab_scales_its_positions_by_a_xavier_mlp(dab: dict[str, Tensor]) -> None:
    assert is_xavier(dab["transformer.decoder.query_scale.layers.0.weight"])
    assert is_xavier(dab["transformer.decoder.ref_point_head.layers.1.weight"])


@pytest.mark.parametrize(
    ("bias", "inputs"),
    [
        ("transformer.encoder.layers.1.linear1.bias", WIDTH),
        ("transformer.encoder.layers.1.linear2.bias", FEEDFORWARD),
        ("transformer.enc_output.bias", WIDTH),
        ("transformer.decoder.ref_point_head.layers.0.bias", 2 * WIDTH),
        ("bbox_embed.0.layers.0.bias", WIDTH),
    ],
)
def test_biases_of_feedforward_and_mlps_are_those_of_pytorch(dino: dict[str, Tensor], bias: str, inputs: int) -> None:
    assert is_uniform(dino[bias], 1 / math.sqrt(inputs)) and dino[bias].abs().max() > 0


def test_biases_of_attention_and_of_the_neck_are_zero(dino: dict[str, Tensor]) -> None:
    names = ["self_attn.in_proj_bias", "self_attn.out_proj.bias", "cross_attn.value_proj.bias"]
    names += ["cross_attn.output_proj.bias", "cross_attn.attention_weights.bias"]
    zero = [f"transformer.decoder.layers.1.{name}" for name in names] + ["input_proj.0.0.bias", "input_proj.3.0.bias"]
    assert not [name for name in zero if dino[name].any()]
    assert not dino["transformer.encoder.layers.0.self_attn.attention_weights.weight"].any()
    assert not dino["transformer.encoder.layers.0.self_attn.sampling_offsets.weight"].any()


def test_norms_start_as_the_identity(dino: dict[str, Tensor]) -> None:
    for name in ("transformer.decoder.norm", "transformer.enc_output_norm", "input_proj.1.1"):
        assert torch.equal(dino[f"{name}.weight"], torch.ones(WIDTH)) and not dino[f"{name}.bias"].any()


@pytest.mark.parametrize("kind", ["dab", "dino"])
def test_a_class_head_starts_at_a_probability_of_one_percent(kind: str, request: pytest.FixtureRequest) -> None:
    state = request.getfixturevalue(kind)
    assert is_default(state["class_embed.0.weight"])
    assert state["class_embed.0.bias"].tolist() == pytest.approx([-math.log(99)] * CLASSES)


def test_the_last_layer_of_a_box_head_of_dino_is_zero(dino: dict[str, Tensor]) -> None:
    heads = ["bbox_embed.0", "transformer.enc_out_bbox_embed"]
    assert not [name for name in heads if dino[f"{name}.layers.2.weight"].any() or dino[f"{name}.layers.2.bias"].any()]
    assert is_default(dino["bbox_embed.0.layers.0.weight"])


def test_heads_of_proposals_are_equal_copies_of_those_of_the_decoder(dino: dict[str, Tensor]) -> None:
    for own, copy in (("class_embed.0.", "enc_out_class_embed."), ("bbox_embed.0.", "enc_out_bbox_embed.")):
        names = [name.removeprefix(own) for name in dino if name.startswith(own)]
        assert names and all(torch.equal(dino[own + n], dino[f"transformer.{copy}{n}"]) for n in names)


def test_heads_of_dab_are_copies_of_one_draw_and_the_first_makes_small_boxes(dab: dict[str, Tensor]) -> None:
    for layer in (1, 2):
        assert torch.equal(dab[f"class_embed.{layer}.weight"], dab["class_embed.0.weight"])
        assert torch.equal(dab[f"bbox_embed.{layer}.layers.1.weight"], dab["bbox_embed.0.layers.1.weight"])
        assert dab[f"bbox_embed.{layer}.layers.2.bias"].tolist() == [0, 0, 0, 0]
    assert dab["bbox_embed.0.layers.2.bias"].tolist() == [0, 0, -2, -2]


@pytest.mark.parametrize(
    ("flags", "name", "rows"),
    [
        (DINO, "label_enc.weight", CLASSES + 1),
        (DINO, "transformer.level_embed", 4),
        (DAB, "tgt_embed.weight", QUERIES),
        (DAB, "refpoint_embed.weight", QUERIES),
        (DAB + " --num_patterns 3", "patterns_embed.weight", 3),
        (DINO + " --content_init normal", "transformer.tgt_embed.weight", QUERIES),  # Co-DINO
    ],
)
def test_tables_are_standard_normal(flags: str, name: str, rows: int) -> None:
    table = state_of(flags)[name]
    assert len(table) == rows and is_standard_normal(table)


def test_random_centres_are_uniform_in_the_image() -> None:
    boxes = state_of(DAB + " --random_refpoints_xy")["refpoint_embed.weight"]
    centres = boxes[:, :2].sigmoid()
    assert 0.15 < centres.std() < 0.4 and centres.min() > 0 and centres.max() < 1
    torch.testing.assert_close(inverse_sigmoid(centres, 1e-3), boxes[:, :2], rtol=1e-3, atol=1e-4)
    assert is_standard_normal(boxes[:, 2:])


def test_every_pattern_is_added_to_all_queries_in_turn() -> None:
    model = build_model(tiny_args(DAB + " --num_patterns 2"))[0]
    tables = {name: getattr(model, name).weight for name in model.table_names}
    memory = type("Memory", (), {"tokens": torch.zeros(1, 7, WIDTH)})()
    claim = type("Claim", (), {"rows": slice(0, 3)})()
    (seeds,) = model.transformer.seeds(memory, nn.Identity(), tables, [claim])
    content, patterns = tables["tgt_embed"][:3], tables["patterns_embed"]
    assert torch.equal(seeds.content[0], torch.cat([content + patterns[0], content + patterns[1]]))
    assert torch.equal(seeds.reference[0, :3], seeds.reference[0, 3:])
