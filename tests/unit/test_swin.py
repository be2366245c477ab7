"""Swin backbone: golden numbers, windows and masks by hand, initial values."""

import copy
from pathlib import Path

import pytest
import torch

from models.backbones import SwinBackbone, swin
from models.backbones.swin import (
    SWINS,
    SwinBlock,
    SwinTransformer,
    WindowAttention,
    from_windows,
    relative_position_index,
    shifted_window_mask,
    to_windows,
)
from tests.golden import case
from util.errors import UserError

CASES = Path(__file__).resolve().parents[1] / "golden" / "cases"
PREFIX = "backbone.0.body."
TINY = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}


def tiny(**changes):
    return SwinTransformer(**{**TINY, **changes})


# Golden numbers


def test_small_windows_give_the_golden_maps_under_the_published_names_in_order():
    meta, arrays = case.load("swin_small_window", CASES)
    model = SwinTransformer(**meta["flags"]).eval()
    published = [(name.removeprefix(PREFIX), shape, dtype) for name, shape, dtype in meta["checkpoint"]]
    ours = [(name, list(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in model.state_dict().items()]
    assert ours == published
    state = {name.removeprefix(PREFIX): value for name, value in case.checkpoint(meta).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("relative_position_index") for name in missing)
    with torch.no_grad():
        maps = model(torch.stack([case.image(93, 133, seed) for seed in (61, 62)]))
    assert len(maps) == 3
    for stage, x in zip((1, 2, 3), maps):
        assert case.difference(x, arrays[f"feature.{stage}"]) < meta["tolerances"]["absolute"]


def test_swin_tiny_gives_the_golden_maps_under_the_published_names_in_order():
    meta, arrays = case.load("hdetr_swin_t_hybrid", CASES)
    backbone = SwinBackbone("swin_tiny", train_backbone=True, drop_path_rate=0.0)
    published = [name.removeprefix("backbone.0.") for name, _, _ in meta["checkpoint"] if name.startswith(PREFIX)]
    assert list(backbone.state_dict()) == published
    state = {k.removeprefix(PREFIX): v for k, v in case.checkpoint(meta).items() if k.startswith(PREFIX)}
    backbone.body.load_state_dict(state, strict=False)
    with torch.no_grad():
        maps = backbone(case.batch(meta)[0])
    for level, x in enumerate(maps):
        tolerance = meta["tolerances"]["absolute"][f"train/probe.feature{level}"]
        assert case.difference(case.probe(x), arrays[f"train/probe.feature{level}.values"]) < tolerance


def test_swin_tiny_trains_all_its_parameters():
    backbone = SwinBackbone("swin_tiny", train_backbone=True)
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert len(trained) == len(list(backbone.parameters())) == 175
    assert sum(parameter.numel() for parameter in trained) == 27520506


# Parts, by hand


def test_relative_position_index_of_a_window_of_two():
    # Cells (0,0) (0,1) (1,0) (1,1); row of the table = (dy + 1) * 3 + (dx + 1)
    assert relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_windows_are_cut_row_by_row_and_put_together_again():
    x = torch.arange(24).view(1, 4, 6, 1)
    windows = to_windows(x, 2)
    assert windows.shape == (6, 4, 1)
    assert windows[0].flatten().tolist() == [0, 1, 6, 7]
    assert windows[1].flatten().tolist() == [2, 3, 8, 9]
    assert windows[3].flatten().tolist() == [12, 13, 18, 19]
    assert torch.equal(from_windows(windows, 2, x.shape), x)


def test_mask_separates_what_only_the_roll_brought_together():
    mask = shifted_window_mask(4, 4, 2, torch.device("cpu"))
    assert mask.shape == (4, 4, 4)
    assert mask[0].eq(0).all()  # top left: nothing was rolled in
    left, right = [0, 2], [1, 3]  # top right window: its second column comes from the left border
    assert mask[1][left][:, left].eq(0).all() and mask[1][right][:, right].eq(0).all()
    assert mask[1][left][:, right].eq(-100).all() and mask[1][right][:, left].eq(-100).all()
    assert mask[3].eq(0).sum() == 4  # bottom right: four regions of one cell


def test_a_single_window_is_masked_in_shifted_blocks_too():
    mask = shifted_window_mask(4, 4, 4, torch.device("cpu"))
    assert mask.shape == (1, 16, 16)
    assert mask.eq(0).sum() == 4 * 4 * 4  # four regions of 2 x 2 cells


def test_window_attention_equals_a_loop_written_from_the_definition():
    torch.manual_seed(0)
    attention = WindowAttention(6, 2, 2).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(4, 4, 6, dtype=torch.float64)  # 2 images of 2 windows
    mask = torch.zeros(2, 4, 4, dtype=torch.float64)
    mask[1, 0, 2:] = -100.0
    qkv = attention.qkv(x)
    expected = torch.zeros_like(x)
    for window in range(4):
        for head in range(2):
            query, key, value = (qkv[window, :, 6 * part + 3 * head : 6 * part + 3 * head + 3] for part in range(3))
            for a in range(4):
                logits = torch.stack([query[a] @ key[b] * 3**-0.5 for b in range(4)]) + mask[window % 2, a]
                for b in range(4):
                    row = (a // 2 - b // 2 + 1) * 3 + (a % 2 - b % 2 + 1)
                    logits[b] += attention.relative_position_bias_table[row, head]
                expected[window, a, 3 * head : 3 * head + 3] = logits.softmax(0) @ value
    torch.testing.assert_close(attention(x, mask), attention.proj(expected))


def test_padding_cells_enter_the_attention_as_zeros_after_the_norm():
    torch.manual_seed(0)
    block = SwinBlock(4, 1, 2, shift=0, drop_path=0.0)
    x = torch.randn(1, 2, 1, 4)  # padded to one window of 2 x 2
    y = block.norm1(x)
    window = torch.stack([y[0, 0, 0], torch.zeros(4), y[0, 1, 0], torch.zeros(4)])[None]
    attended = x + block.attn(window, None)[:, [0, 2]].view(1, 2, 1, 4)
    expected = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(x, shifted_window_mask(2, 2, 2, x.device)), expected)


def test_odd_blocks_shift_by_half_a_window():
    blocks = SwinBackbone("swin_tiny", train_backbone=True).body.layers[2].blocks
    assert [block.shift for block in blocks] == [0, 3, 0, 3, 0, 3]


def test_merging_concatenates_down_before_right():
    merging = swin.PatchMerging(1)
    merging.norm = torch.nn.Identity()
    merging.reduction = torch.nn.Identity()
    x = torch.tensor([[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]]).view(1, 2, 3, 1)
    assert merging(x)[0, 0].tolist() == [[1, 3, 2, 4], [5, 6, 0, 0]]


@pytest.mark.parametrize("size", [(1, 1), (31, 45), (64, 64), (67, 130)])
def test_any_size_gives_maps_rounded_up(size):
    with torch.no_grad():
        maps = tiny().eval()(torch.randn(1, 3, *size))
    for x, stride, channels in zip(maps, (8, 16, 32), (16, 32, 64)):
        assert x.shape == (1, channels, -(-size[0] // stride), -(-size[1] // stride))


# Training


def test_bfloat16_autocast_stays_near_float32():
    torch.manual_seed(0)
    model = tiny().eval()
    pixels = torch.randn(1, 3, 40, 56)
    with torch.no_grad():
        exact = model(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(pixels)
    for x, y in zip(exact, half):
        assert (x - y).norm() / x.norm() < 0.02


def test_the_whole_model_runs_in_bfloat16_without_autocast():
    maps = tiny().bfloat16()(torch.randn(1, 3, 40, 56).bfloat16())
    assert all(x.dtype == torch.bfloat16 for x in maps)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = tiny()
    sum(x.square().sum() for x in model(torch.randn(2, 3, 70, 50))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_gives_the_same_gradients_and_is_off_in_evaluation(monkeypatch):
    calls = []
    original = swin.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(swin, "checkpoint", counted)
    torch.manual_seed(0)
    plain = tiny(drop_path_rate=0.5)
    saving = copy.deepcopy(plain)
    saving.use_checkpoint = True
    pixels = torch.randn(2, 3, 48, 48)
    for model in (plain, saving):
        torch.manual_seed(1)
        sum(x.square().sum() for x in model(pixels)).backward()
    assert len(calls) == 8
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    saving.eval()(pixels)
    with torch.no_grad():
        saving.train()(pixels)
    assert len(calls) == 8


def test_stochastic_depth_rises_linearly_over_all_blocks_and_is_off_in_evaluation():
    model = tiny(drop_path_rate=0.7)
    rates = [block.drop_path.p for stage in model.layers for block in stage.blocks]
    torch.testing.assert_close(rates, [0.1 * i for i in range(8)], atol=1e-6, rtol=0)
    pixels = torch.randn(1, 3, 32, 32)
    model.eval()
    assert all(torch.equal(x, y) for x, y in zip(model(pixels), model(pixels)))


def test_stochastic_depth_drops_whole_images_and_scales_what_is_kept():
    torch.manual_seed(0)
    block = SwinBlock(4, 1, 2, shift=0, drop_path=0.5)
    block.mlp = torch.nn.Identity()
    block.norm2 = torch.nn.Identity()
    x = torch.randn(1, 2, 2, 4).expand(64, -1, -1, -1)
    mask = shifted_window_mask(2, 2, 2, x.device)
    attended = block.eval()(x, mask)[0] / 2 - x[0]  # the block doubles x + attention, as its MLP is the identity
    kinds = torch.stack([(x[0] + keep * attended) * (1 + mlp) for keep in (0.0, 2.0) for mlp in (0.0, 2.0)])
    distances = (block.train()(x, mask)[:, None] - kinds).abs().amax((2, 3, 4))  # (64 images, 4 kinds)
    nearest, found = distances.min(dim=1)
    assert nearest.max() < 1e-5
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_a_frozen_backbone_has_no_gradient_and_no_noise():
    backbone = SwinBackbone("swin_tiny", train_backbone=False, drop_path_rate=0.5, use_checkpoint=True).train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    pixels = torch.randn(1, 3, 32, 32)
    assert all(torch.equal(x, y) for x, y in zip(backbone(pixels), backbone(pixels)))


def test_train_and_eval_return_the_module():
    backbone = SwinBackbone("swin_tiny", train_backbone=True)
    assert backbone.eval() is backbone and backbone.train() is backbone
    assert backbone.body.train() is backbone.body


# Sizes and initial values


@pytest.mark.parametrize("name", SWINS)
def test_published_sizes(name):
    embed, depths, heads, window = {
        "swin_tiny": (96, (2, 2, 6, 2), 3, 7),
        "swin_small": (96, (2, 2, 18, 2), 3, 7),
        "swin_base": (128, (2, 2, 18, 2), 4, 7),
        "swin_base_window12": (128, (2, 2, 18, 2), 4, 12),
        "swin_large": (192, (2, 2, 18, 2), 6, 7),
        "swin_large_window12": (192, (2, 2, 18, 2), 6, 12),
    }[name]
    with torch.device("meta"):
        backbone = SwinBackbone(name, train_backbone=True)
    assert backbone.strides == (8, 16, 32)
    assert backbone.channels == (2 * embed, 4 * embed, 8 * embed)
    for s, stage in enumerate(backbone.body.layers):
        assert len(stage.blocks) == depths[s]
        table = stage.blocks[0].attn.relative_position_bias_table
        assert table.shape == ((2 * window - 1) ** 2, heads * 2**s)


def test_initial_values():
    torch.manual_seed(0)
    for name, value in SwinBackbone("swin_tiny", train_backbone=True).body.named_parameters():
        if name.startswith("patch_embed.proj"):
            bound = 48**-0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
        elif "norm" in name:
            assert value.eq(1 if name.endswith("weight") else 0).all(), name
        elif name.endswith("bias"):
            assert value.eq(0).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.12), name
            assert abs(value.mean().item()) < 0.003, name


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"swin_huge.*swin_tiny.*swin_large_window12"):
        SwinBackbone("swin_huge", train_backbone=True)


@pytest.mark.parametrize("stages", [(), (3, 1), (4,), (-1, 0)])
def test_impossible_stages_are_refused(stages):
    with pytest.raises(ValueError, match="ascending numbers of 0 to 3"):
        tiny(out_stages=stages)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_an_impossible_drop_path_rate_is_refused(rate):
    with pytest.raises(UserError, match="--drop_path_rate"):
        tiny(drop_path_rate=rate)
