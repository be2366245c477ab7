"""ResNet backbones, the joiner and the builder: golden numbers, freezing, weights, messages."""

import urllib.error
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from models.backbones import (
    BACKBONES,
    FrozenBatchNorm2d,
    Joiner,
    ResNetBackbone,
    build_backbone,
    resize_padding,
    resnet,
    swin,
    weights,
)
from models.position_encoding import LearnedPositionEncoding, SinePositionEncoding
from tests.golden import case
from util.errors import UserError

CASES = Path(__file__).resolve().parents[1] / "golden" / "cases"


def arguments(**changes):
    settings = {
        "backbone": "resnet18",
        "lr_backbone": 2e-5,
        "dilation": False,
        "num_feature_levels": 4,
        "return_interm_indices": None,
        "backbone_norm": "frozen",
        "backbone_weights": "none",
        "pretrained_backbone_path": "",
        "drop_path_rate": 0.2,
        "use_checkpoint": False,
    }
    return Namespace(**{**settings, **changes})


def small(**changes):
    return ResNetBackbone("resnet18", **{"train_backbone": True, "weights": "none", **changes})


def trainable(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def imagenet_state():
    torch.manual_seed(1)
    return torchvision.models.resnet18().state_dict()  # with classifier and num_batches_tracked


# Frozen norm


def test_frozen_norm_gives_the_golden_numbers_and_drops_the_counter_silently():
    meta, arrays = case.load("frozen_bn", CASES)
    state = {name.removeprefix("bn1."): value for name, value in case.checkpoint(meta).items()}
    state["running_var"][0] = 0
    norm = FrozenBatchNorm2d(12)
    norm.load_state_dict({**state, "num_batches_tracked": torch.tensor(7)}, strict=True)
    x = torch.from_numpy(np.random.RandomState(51).randn(2, 12, 5, 4).astype(np.float32))
    largest = np.abs(arrays["output"]).max()
    assert case.difference(norm(x), arrays["output"]) < meta["tolerances"]["relative"] * largest
    assert list(norm.parameters()) == []
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]


def test_frozen_norm_does_not_change_in_train_mode_and_passes_gradients():
    norm = FrozenBatchNorm2d(3).train()
    norm.load_state_dict({**norm.state_dict(), "weight": torch.tensor([1.0, 2.0, 3.0])})
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(x.grad[0, :, 0, 0], torch.tensor([1.0, 2.0, 3.0]) / (1 + 1e-5) ** 0.5)


def test_frozen_norm_keeps_half_precision_and_memory_format():
    x = torch.randn(2, 3, 4, 5).bfloat16().to(memory_format=torch.channels_last)
    result = FrozenBatchNorm2d(3)(x)
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=torch.channels_last)


# Maps


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (128, 256, 512)), ("resnet34", (128, 256, 512)), ("resnet50", (512, 1024, 2048))],
)
def test_maps_have_the_declared_strides_and_channels_and_round_odd_sizes_up(name, channels):
    backbone = ResNetBackbone(name, train_backbone=True, weights="none").eval()
    assert backbone.strides == (8, 16, 32)
    assert backbone.channels == channels
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 65, 97))
    assert [tuple(x.shape) for x in maps] == [
        (1, channels[0], 9, 13),
        (1, channels[1], 5, 7),
        (1, channels[2], 3, 4),
    ]


def test_dilation_keeps_the_last_stage_at_stride_16():
    backbone = ResNetBackbone("resnet50", train_backbone=True, weights="none", dilation=True, stages=(3, 4))
    assert backbone.strides == (16, 16)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape[1:]) for x in maps] == [(1024, 4, 6), (2048, 4, 6)]


def test_stages_after_the_last_one_asked_for_are_not_built():
    backbone = small(stages=(1, 2))
    assert (backbone.strides, backbone.channels) == ((4, 8), (64, 128))
    assert not any(name.startswith("body.layer3") for name in backbone.state_dict())
    assert [x.shape[-1] for x in backbone(torch.randn(1, 3, 32, 32))] == [8, 4]


@pytest.mark.parametrize("name", ["ddetr_base", "ddetr_single_scale_dc5"])
def test_resnet50_has_the_published_names_and_golden_maps(name):
    meta, arrays = case.load(name, CASES)
    prefix = "backbone.0."
    state = {key.removeprefix(prefix): v for key, v in case.checkpoint(meta).items() if key.startswith(prefix)}
    flags = {"num_feature_levels": 4, "dilation": False, **meta["flags"]}
    backbone = build_backbone(arguments(**{**vars(arguments()), **flags, "backbone": "resnet50"}))
    assert list(backbone.state_dict()) == list(state)
    backbone.load_state_dict(state)
    with torch.no_grad():
        maps = backbone(case.batch(meta)[0])
    assert len(maps) == sum(key.startswith("probe.feature") and key.endswith("values") for key in arrays)
    for level, x in enumerate(maps):
        key = f"probe.feature{level}"
        tolerance = meta["tolerances"]["absolute"][key]
        assert case.difference(case.probe(x), arrays[f"{key}.values"]) < tolerance
        assert case.difference(torch.stack([x.mean(), x.std(), x.abs().max()]), arrays[f"{key}.stats"]) < tolerance


def test_bfloat16_autocast_stays_near_float32():
    torch.manual_seed(0)
    backbone = small().eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = backbone(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = backbone(pixels)
    for x, y in zip(exact, half):
        assert y.dtype == torch.bfloat16
        assert (x - y).norm() / x.norm() < 0.02


# Freezing


def test_resnet50_trains_stages_2_to_4_only():
    backbone = ResNetBackbone("resnet50", train_backbone=True, weights="none")
    names = trainable(backbone)
    assert len(names) == 42
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 23232512
    assert len(list(backbone.parameters())) - len(names) == 11
    assert {name.split(".")[1] for name in names} == {"layer2", "layer3", "layer4"}


def test_frozen_parameters_get_no_gradient():
    backbone = small()
    sum(x.sum() for x in backbone(torch.randn(1, 3, 32, 32))).backward()
    with_gradient = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable(backbone)


@pytest.mark.parametrize("frozen_norm", [True, False])
def test_an_untrained_backbone_is_frozen_completely(frozen_norm):
    backbone = small(train_backbone=False, frozen_norm=frozen_norm).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 32, 32))
    assert trainable(backbone) == set()
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_from_scratch_with_trainable_norm_everything_is_trained():
    backbone = small(frozen_norm=False)
    assert trainable(backbone) == {name for name, _ in backbone.named_parameters()}
    assert "body.bn1.weight" in trainable(backbone)
    backbone(torch.randn(2, 3, 32, 32))
    assert backbone.body.bn1.running_mean.abs().sum() > 0


def test_what_is_trained_does_not_change_when_a_checkpoint_takes_the_place_of_weights(tmp_path, imagenet_state):
    torch.save(imagenet_state, tmp_path / "weights.pth")
    started = small(frozen_norm=False, weights=tmp_path / "weights.pth")
    resumed = small(frozen_norm=False, weights="checkpoint")
    assert trainable(resumed) == trainable(started) != trainable(small(frozen_norm=False))


def test_trainable_norms_of_frozen_stages_stay_in_evaluation_mode(tmp_path, imagenet_state):
    torch.save(imagenet_state, tmp_path / "r18.pth")
    backbone = small(frozen_norm=False, weights=str(tmp_path / "r18.pth"))
    assert backbone.train() is backbone
    body = backbone.body
    assert not body.bn1.training and not body.layer1[0].bn1.training
    assert body.layer2[0].bn1.training
    assert not backbone.eval().body.layer2[0].bn1.training
    assert "body.bn1.weight" not in trainable(backbone)


# Weights


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_file_of_weights_is_loaded_without_its_classifier(tmp_path, imagenet_state, wrap):
    path = tmp_path / "weights.pth"
    torch.save(wrap({f"module.{name}": value for name, value in imagenet_state.items()}), path)
    backbone = small(weights=str(path))
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, imagenet_state[name]), name


def test_a_file_without_counters_fits_trainable_norms(tmp_path, imagenet_state):
    state = {name: value for name, value in imagenet_state.items() if "num_batches" not in name}
    torch.save(state, tmp_path / "old.pth")
    backbone = small(weights=str(tmp_path / "old.pth"), frozen_norm=False)
    assert torch.equal(backbone.body.conv1.weight, state["conv1.weight"])


def test_a_file_of_another_network_is_refused_with_examples(tmp_path, imagenet_state):
    torch.save(imagenet_state, tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"r18\.pth do not fit .*missing: .*layer1\.0\.conv3\.weight.*other shape: "):
        ResNetBackbone("resnet50", train_backbone=True, weights=str(tmp_path / "r18.pth"))


def test_a_missing_file_is_named_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file.*--backbone_weights none"):
        small(weights=str(tmp_path / "nowhere.pth"))


class Harmful:
    """Stands for arbitrary code in a pickle."""


@pytest.mark.parametrize("content", [b"<html>not found</html>", b""])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "page.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"page\.pth: not a file of plain tensors"):
        small(weights=str(tmp_path / "page.pth"))


def test_code_in_a_file_is_not_run(tmp_path, imagenet_state):
    torch.save({"model": imagenet_state, "args": Harmful()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"code\.pth: not a file of plain tensors.*save its state dict alone"):
        small(weights=str(tmp_path / "code.pth"))


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}])
def test_a_file_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: expected a state dict"):
        small(weights=str(tmp_path / "other.pth"))


def test_default_weights_come_from_the_cache_of_torch_hub(tmp_path, monkeypatch, imagenet_state):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    file_name = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(imagenet_state, tmp_path / "hub" / "checkpoints" / file_name)
    backbone = small(weights="default")
    assert torch.equal(backbone.body.conv1.weight, imagenet_state["conv1.weight"])


def test_a_failed_download_names_the_flags_that_help(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    with pytest.raises(UserError, match=r"no route to host.*--backbone_weights PATH.*--backbone_weights none"):
        small(weights="default")


@pytest.mark.parametrize(("local_rank", "order"), [(0, ["fetch", "barrier"]), (1, ["barrier", "fetch"])])
def test_one_process_per_machine_downloads_before_the_others_load(monkeypatch, imagenet_state, local_rank, order):
    calls = []
    monkeypatch.setattr(weights.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(weights.dist, "get_rank", lambda: 8 + local_rank)
    monkeypatch.setattr(weights.dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(resnet, "_fetch", lambda name: calls.append("fetch") or imagenet_state)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    backbone = small(weights="default")
    assert calls == order
    assert torch.equal(backbone.body.conv1.weight, imagenet_state["conv1.weight"])


def test_a_failed_download_does_not_leave_the_other_processes_waiting(monkeypatch):
    calls = []

    def fail(name):
        raise UserError("no network")

    monkeypatch.setattr(weights.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(weights.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(weights.dist, "barrier", lambda: calls.append("barrier"))
    monkeypatch.setattr(resnet, "_fetch", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="no network"):
        small(weights="default")
    assert calls == ["barrier"]


# Wrong settings


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_dilation_of_basic_blocks_is_refused(name):
    with pytest.raises(UserError, match=f"--dilation needs resnet50 or resnet101.*{name}"):
        build_backbone(arguments(backbone=name, dilation=True))


@pytest.mark.parametrize("stages", [(), (4, 3), (0, 1), (5,), (2, 2)])
def test_impossible_stages_are_refused(stages):
    with pytest.raises(ValueError, match="ascending numbers of 1 to 4"):
        small(stages=stages)


# Builder and joiner


def test_an_unknown_backbone_is_answered_with_the_allowed_names():
    with pytest.raises(UserError, match="vgg16") as error:
        build_backbone(arguments(backbone="vgg16"))
    assert all(name in str(error.value) for name in BACKBONES)
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "swin_tiny", "swin_large_window12"} <= set(BACKBONES)


def test_an_unknown_norm_is_refused():
    with pytest.raises(UserError, match="--backbone_norm must be frozen or train, got 'sync'"):
        build_backbone(arguments(backbone_norm="sync"))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny"])
def test_one_feature_level_means_the_last_map_only(name):
    backbone = build_backbone(arguments(backbone=name, num_feature_levels=1))
    assert backbone.strides == (32,)
    assert len(backbone(torch.randn(1, 3, 64, 64))) == 1


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny"])
def test_named_maps_are_those_that_are_used(name):
    backbone = build_backbone(arguments(backbone=name, num_feature_levels=5, return_interm_indices=[0, 1, 2, 3]))
    assert backbone.strides == (4, 8, 16, 32)
    assert [m.shape[-1] for m in backbone(torch.randn(1, 3, 64, 64))] == [16, 8, 4, 2]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny"])
def test_no_backbone_rate_freezes_the_backbone(name):
    assert trainable(build_backbone(arguments(backbone=name, lr_backbone=0))) == set()


def test_backbone_norm_train_builds_ordinary_norms():
    backbone = build_backbone(arguments(backbone_norm="train"))
    assert "body.bn1.num_batches_tracked" in backbone.state_dict()


def test_pretrained_backbone_path_stands_in_for_backbone_weights(tmp_path, imagenet_state):
    torch.save(imagenet_state, tmp_path / "r18.pth")
    given = {"pretrained_backbone_path": str(tmp_path / "r18.pth")}
    backbone = build_backbone(arguments(backbone_weights="default", **given))
    assert torch.equal(backbone.body.conv1.weight, imagenet_state["conv1.weight"])
    backbone = build_backbone(arguments(backbone_weights="none", **given))
    assert not torch.equal(backbone.body.conv1.weight, imagenet_state["conv1.weight"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "swin_tiny_patch4_window7_224.ms_in1k"),
        ({"backbone": "swin_large_window12"}, "swin_large_patch4_window12_384.ms_in22k"),
        ({"pretrained_backbone_path": "swin_tiny_patch4_window7_224"}, "swin_tiny_patch4_window7_224"),
        ({"backbone_weights": "some.pth"}, "some.pth"),
    ],
)
def test_swin_starts_from_its_default_weights_or_those_that_a_flag_names(monkeypatch, given, expected):
    loaded = []
    monkeypatch.setattr(swin, "load_swin_weights", lambda body, source: loaded.append(source))
    with torch.device("meta"):
        build_backbone(arguments(**{"backbone": "swin_tiny", "backbone_weights": "default", **given}))
    assert loaded == [expected]


@pytest.mark.parametrize("none", ["none", "checkpoint"])
def test_swin_loads_nothing_when_told_so(monkeypatch, none):
    monkeypatch.setattr(swin, "load_swin_weights", lambda body, source: pytest.fail(f"loads {source}"))
    with torch.device("meta"):
        build_backbone(arguments(backbone="swin_tiny", backbone_weights=none, pretrained_backbone_path="some.pth"))


def test_dilation_of_swin_is_refused():
    with pytest.raises(UserError, match="--dilation is for resnet50 and resnet101, not for swin_tiny"):
        build_backbone(arguments(backbone="swin_tiny", dilation=True))


def test_joiner_has_the_published_names():
    joiner = Joiner(small(), LearnedPositionEncoding(8))
    names = list(joiner.state_dict())
    assert names[0] == "0.body.conv1.weight"
    assert names[-2:] == ["1.row_embed.weight", "1.col_embed.weight"]
    assert (joiner.strides, joiner.channels) == ((8, 16, 32), (128, 256, 512))


def test_joiner_returns_every_map_with_its_padding():
    joiner = Joiner(small(), SinePositionEncoding(8)).eval()
    pixels = torch.randn(2, 3, 70, 90)
    padding = torch.zeros(2, 70, 90, dtype=torch.bool)
    padding[1, :, 40:] = True
    with torch.no_grad():
        pairs = joiner(pixels, padding)
        maps = joiner[0](pixels)
    assert len(pairs) == 3
    for (feature, feature_padding), expected in zip(pairs, maps):
        assert torch.equal(feature, expected)
        assert feature_padding.dtype == torch.bool
        assert feature_padding.shape == feature.shape[:1] + feature.shape[2:]
        assert torch.equal(feature_padding, resize_padding(padding, feature.shape[-2:]))


def test_padding_is_resized_to_the_nearest_cell_rounded_down():
    padding = torch.tensor([[[False] * 4 + [True]] * 3])  # (1, 3, 5)
    # 2 columns read the columns 0 and 2, 3 columns 0, 1, 3, and 5 columns all of them
    assert resize_padding(padding, (1, 2)).tolist() == [[[False, False]]]
    assert resize_padding(padding, (1, 3)).tolist() == [[[False, False, False]]]
    assert resize_padding(padding, (2, 5)).tolist() == [[[False] * 4 + [True]] * 2]
    assert resize_padding(~padding, (1, 2)).tolist() == [[[True, True]]]
