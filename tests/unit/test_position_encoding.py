"""Position encodings: hand values, golden numbers, precision, limits."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from models.position_encoding import (
    LearnedPositionEncoding,
    SinePositionEncoding,
    build_position_encoding,
    sine_embed_boxes,
)
from tests.golden import case
from util.errors import UserError

CASES = Path(__file__).resolve().parents[1] / "golden" / "cases"


def arguments(**changes):
    settings = {"position_embedding": "sine", "hidden_dim": 64, "position_embedding_scale": 2 * math.pi}
    settings |= {"pe_temperature": 10000.0, "pe_half_cell": True}
    return Namespace(**{**settings, **changes})


def test_sine_of_a_single_cell_is_half_a_turn_in_both_axes():
    encoding = SinePositionEncoding(4)(torch.zeros(1, 1, 1, dtype=torch.bool)).flatten()
    # (1 - 0.5) / 1 * 2 pi = pi; wavelengths 1 and 10000 ** 0.5 = 100
    axis = [math.sin(math.pi), math.cos(math.pi), math.sin(math.pi / 100), math.cos(math.pi / 100)]
    torch.testing.assert_close(encoding, torch.tensor(axis + axis), atol=1e-5, rtol=0)


def test_sine_has_rows_in_the_first_half_and_columns_in_the_second():
    encoding = SinePositionEncoding(2)(torch.zeros(1, 2, 3, dtype=torch.bool))[0]
    rows = torch.tensor([0.5, 1.5]) / 2 * 2 * math.pi
    columns = torch.tensor([0.5, 1.5, 2.5]) / 3 * 2 * math.pi
    torch.testing.assert_close(encoding[0], rows.sin()[:, None].expand(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding[1], rows.cos()[:, None].expand(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding[2], columns.sin()[None].expand(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding[3], columns.cos()[None].expand(2, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("subcase", ["full", "padded", "narrow"])
def test_sine_gives_the_golden_numbers(subcase):
    meta, arrays = case.load("sine_position", CASES)
    encoding = SinePositionEncoding(meta["subcases"][subcase]["num_pos_feats"])
    mask = torch.from_numpy(arrays[f"{subcase}/mask"]).bool()
    assert case.difference(encoding(mask), arrays[f"{subcase}/pos"]) < meta["tolerances"]["absolute"]


def test_sine_of_valid_cells_does_not_depend_on_how_much_is_padded():
    padding = torch.ones(1, 9, 11, dtype=torch.bool)
    padding[:, :5, :7] = False
    encoding = SinePositionEncoding(8)
    assert torch.equal(encoding(padding)[..., :5, :7], encoding(padding[:, :5, :7]))


def test_sine_of_a_fully_padded_map_is_finite():
    assert SinePositionEncoding(8)(torch.ones(2, 3, 4, dtype=torch.bool)).isfinite().all()


def test_scale_multiplies_the_angle():
    encoding = SinePositionEncoding(2, scale=1.0)(torch.zeros(1, 1, 1, dtype=torch.bool)).flatten()
    torch.testing.assert_close(encoding[0], torch.tensor(0.5).sin())


@pytest.mark.parametrize("encoding", [SinePositionEncoding(16), LearnedPositionEncoding(16)])
def test_encoding_is_computed_in_float32_under_autocast_and_cast_on_request(encoding):
    padding = torch.zeros(1, 40, 50, dtype=torch.bool)
    expected = encoding(padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = encoding(padding)
        half = encoding(padding, torch.bfloat16)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    assert torch.equal(half, expected.bfloat16())


def test_learned_looks_up_the_column_first_and_the_row_second():
    encoding = LearnedPositionEncoding(3)
    result = encoding(torch.ones(2, 4, 5, dtype=torch.bool))
    assert result.shape == (2, 6, 4, 5)
    for row, column in [(0, 0), (3, 1), (2, 4)]:
        expected = torch.cat([encoding.col_embed.weight[column], encoding.row_embed.weight[row]])
        assert torch.equal(result[1, :, row, column], expected)


def test_learned_tables_start_uniform_between_0_and_1_and_are_trained():
    torch.manual_seed(0)
    encoding = LearnedPositionEncoding(128)
    assert [(name, p.shape) for name, p in encoding.named_parameters()] == [
        ("row_embed.weight", (50, 128)),
        ("col_embed.weight", (50, 128)),
    ]
    for table in encoding.parameters():
        assert 0 <= table.min() < 0.01 and 0.99 < table.max() < 1
        assert table.std().item() == pytest.approx(12**-0.5, abs=0.01)
    encoding(torch.zeros(1, 2, 3, dtype=torch.bool)).sum().backward()
    assert encoding.col_embed.weight.grad[:4].sum(1).tolist() == [256, 256, 256, 0]


@pytest.mark.parametrize("size", [(51, 3), (3, 51)])
def test_learned_refuses_maps_larger_than_its_tables(size):
    encoding = LearnedPositionEncoding(4)
    with pytest.raises(UserError, match=rf"50 rows and columns, but a feature map is {size[0]} x {size[1]}"):
        encoding(torch.zeros(1, *size, dtype=torch.bool))
    assert encoding(torch.zeros(1, 50, 50, dtype=torch.bool)).shape == (1, 8, 50, 50)


def test_box_embedding_has_blocks_of_cx_cy_w_h_with_sine_and_cosine_in_turn():
    box = torch.tensor([0.25, 0.5, 0.125, 1.0])
    embedding = sine_embed_boxes(box, 4)
    expected = [
        value
        for angle in (math.pi / 2, math.pi, math.pi / 4, 2 * math.pi)
        for value in (math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100))
    ]
    torch.testing.assert_close(embedding, torch.tensor(expected), atol=1e-6, rtol=0)


def test_box_embedding_gives_the_golden_numbers():
    meta, arrays = case.load("two_stage_proposals", CASES)
    boxes = torch.from_numpy(arrays["pos_embed_input"]).sigmoid()
    assert case.difference(sine_embed_boxes(boxes, 128), arrays["pos_embed"]) < meta["tolerances"]["absolute"]


def test_box_embedding_keeps_float64_and_raises_half_precision_to_float32():
    boxes = torch.rand(2, 3, 4)
    assert sine_embed_boxes(boxes.double(), 8).dtype == torch.float64
    half = sine_embed_boxes(boxes.bfloat16(), 8)
    assert half.shape == (2, 3, 32)
    assert torch.equal(half, sine_embed_boxes(boxes.bfloat16().float(), 8))


@pytest.mark.parametrize("make", [SinePositionEncoding, lambda feats: sine_embed_boxes(torch.rand(1, 4), feats)])
def test_an_odd_number_of_features_is_refused(make):
    with pytest.raises(ValueError, match=r"even number .* got 5"):
        make(5)


def test_build_reads_the_flags():
    sine = build_position_encoding(arguments(position_embedding_scale=3.0))
    assert isinstance(sine, SinePositionEncoding)
    assert (sine.num_feats, sine.scale, sine.temperature, sine.shift) == (32, 3.0, 10000.0, 0.5)
    of_dino = build_position_encoding(arguments(pe_temperature=20.0, pe_half_cell=False))
    assert (of_dino.temperature, of_dino.shift) == (20.0, 0.0)
    learned = build_position_encoding(arguments(position_embedding="learned"))
    assert isinstance(learned, LearnedPositionEncoding)
    assert learned.row_embed.weight.shape == (50, 32)


@pytest.mark.parametrize("changes", [{"position_embedding": "rotary"}, {"hidden_dim": 66}])
def test_build_refuses_unknown_encodings_and_widths(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        build_position_encoding(arguments(**changes))
