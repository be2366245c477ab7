"""ImageNet weights of Swin: published files, timm's files and names, downloads."""

import re
import urllib.error
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from models.backbones import SwinBackbone, swin, swin_weights
from models.backbones.swin import SWINS, SwinSize, SwinTransformer
from models.backbones.swin_weights import in_published_naming, load_swin_weights, resize_bias_table, timm_name
from util.errors import UserError

TINY = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 4}
TINY_NAME = "swin_tiny_patch4_window7_224"


def tiny(**changes):
    return SwinTransformer(**{**TINY, **changes})


def classifier_state(**changes):
    """A file of ImageNet weights as published: classifier, final norm and masks, but no norms of the outputs."""
    model = tiny(**changes)
    state = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    state = {k: v for k, v in state.items() if not k.startswith(("norm1.", "norm2.", "norm3."))}
    extra = {"norm.weight": torch.ones(64), "norm.bias": torch.ones(64), "head.weight": torch.ones(10, 64)}
    return {**state, **extra, "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}


# Published files


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "model": {}}])
def test_a_published_file_is_loaded_without_classifier_and_output_norms_stay_fresh(tmp_path, wrap):
    state = classifier_state()
    torch.save(wrap({f"module.{name}": value for name, value in state.items()}), tmp_path / "swin.pth")
    model = tiny()
    load_swin_weights(model, str(tmp_path / "swin.pth"))
    for name, value in model.state_dict().items():
        if name.startswith(("norm1.", "norm2.", "norm3.")):
            assert value.eq(1 if name.endswith("weight") else 0).all(), name
        else:
            assert torch.equal(value, state[name]), name


def test_a_file_of_another_window_size_gets_resized_tables_and_the_models_own_index(tmp_path):
    state = classifier_state(window_size=3)
    torch.save({"model": state}, tmp_path / "window3.pth")
    model = tiny()
    index = model.layers[0].blocks[0].attn.relative_position_index.clone()
    load_swin_weights(model, str(tmp_path / "window3.pth"))
    attention = model.layers[1].blocks[0].attn
    assert torch.equal(attention.relative_position_index, index)
    table = state["layers.1.blocks.0.attn.relative_position_bias_table"]
    for head in range(2):
        image = table[:, head].view(1, 1, 5, 5)  # rows dy, columns dx
        expected = F.interpolate(image, size=(7, 7), mode="bicubic", align_corners=False, antialias=False)
        torch.testing.assert_close(attention.relative_position_bias_table[:, head], expected.flatten())


def test_resizing_keeps_constant_tables_and_the_two_axes_apart():
    torch.testing.assert_close(resize_bias_table(torch.full((25, 2), 3.0), 49), torch.full((49, 2), 3.0))
    ramp = torch.arange(5.0)[:, None].expand(5, 5).reshape(25, 1)  # grows with dy
    resized = resize_bias_table(ramp, 49).view(7, 7)
    assert (resized.diff(dim=0) > 0).all()
    torch.testing.assert_close(resized.diff(dim=1), torch.zeros(7, 6), atol=1e-5, rtol=0)
    assert resize_bias_table(ramp, 25) is ramp


def test_stages_that_are_not_built_are_skipped_in_the_file(tmp_path):
    state = classifier_state()
    torch.save(state, tmp_path / "swin.pth")
    model = tiny(out_stages=(1, 2))
    load_swin_weights(model, str(tmp_path / "swin.pth"))
    assert torch.equal(model.layers[2].blocks[1].mlp.fc2.weight, state["layers.2.blocks.1.mlp.fc2.weight"])
    assert not hasattr(model.layers[2], "downsample")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2, 2, 4, 2)}, r"unknown: .*layers\.2\.blocks\.2"),
        ({"depths": (2, 2, 1, 2)}, r"missing: .*layers\.2\.blocks\.1"),
        ({"num_heads": (2, 2, 2, 4)}, r"other shape: .*bias_table \(49, 2\) instead of \(49, 1\)"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, changes, message):
    torch.save(classifier_state(**changes), tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        load_swin_weights(tiny(), str(tmp_path / "other.pth"))


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.pth: no such file.*--pretrained_backbone_path"):
        SwinBackbone("swin_tiny", train_backbone=True, weights="nowhere.pth")


# timm's files


@pytest.fixture(scope="module")
def timm_model():
    """timm's Swin of the sizes `TINY` with random numbers everywhere; every map is a multiple of the window."""
    timm_swin = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(2)
    model = timm_swin.SwinTransformer(img_size=(256, 384), num_classes=10, **TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.ndim == 1))
    return model


def timm_maps(model, pixels):
    maps, x = [], model.patch_embed(pixels)
    for stage in model.layers:
        x = stage(x)
        maps.append(x.permute(0, 3, 1, 2))
    return maps


def largest_error(maps, expected):
    return max((x - y).abs().max() / y.abs().max() for x, y in zip(maps, expected))


@pytest.mark.parametrize("kind", ["pth", "safetensors", "pth of a training run"])
def test_a_file_of_timm_gives_the_maps_of_timm(tmp_path, timm_model, kind):
    path = tmp_path / f"timm.{kind.split()[0]}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(timm_model.state_dict(), path)
    elif kind == "pth":
        torch.save(timm_model.state_dict(), path)
    else:
        torch.save({"state_dict": timm_model.state_dict(), "args": Namespace(model="swin"), "epoch": 3}, path)
    model = tiny(out_stages=(0, 1, 2, 3)).eval()
    load_swin_weights(model, str(path))
    for stage in range(4):
        setattr(model, f"norm{stage}", torch.nn.Identity())
    pixels = torch.randn(2, 3, 256, 384)
    with torch.no_grad():
        assert largest_error(model(pixels), timm_maps(timm_model, pixels)) < 1e-5


def test_maps_tell_a_wrong_order_of_the_merged_cells(tmp_path, timm_model):
    torch.save(timm_model.state_dict(), tmp_path / "timm.pth")
    model = tiny(out_stages=(1,)).eval()
    load_swin_weights(model, str(tmp_path / "timm.pth"))
    model.norm1 = torch.nn.Identity()
    with torch.no_grad():
        weight = model.layers[0].downsample.reduction.weight
        weight.copy_(weight.view(16, 2, 2, 8).transpose(1, 2).reshape(16, 32))  # rows before columns
        pixels = torch.randn(1, 3, 256, 384)
        assert largest_error(model(pixels), timm_maps(timm_model, pixels)[1:2]) > 1e-2


def test_mergings_of_timm_move_to_the_stage_before_and_published_ones_stay():
    names = ["layers.1.downsample.norm.weight", "layers.3.downsample.reduction.weight", "layers.1.blocks.0.norm1.bias"]
    timm = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    assert {name: value.item() for name, value in in_published_naming(timm).items()} == {
        "layers.0.downsample.norm.weight": 0,
        "layers.2.downsample.reduction.weight": 1,
        "layers.1.blocks.0.norm1.bias": 2,
    }
    published = {"layers.0.downsample.norm.weight": torch.ones(1), **timm}
    assert in_published_naming(published) is published


def test_a_file_of_timm_fits_where_the_last_stage_is_not_built(tmp_path, timm_model):
    state = timm_model.state_dict()
    torch.save(state, tmp_path / "timm.pth")
    model = tiny(out_stages=(1, 2))
    load_swin_weights(model, str(tmp_path / "timm.pth"))
    reduction = model.layers[1].downsample.reduction.weight
    assert torch.equal(reduction, state["layers.2.downsample.reduction.weight"])


def test_a_safetensors_file_that_is_none_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "page.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"page\.safetensors: not a safetensors file"):
        load_swin_weights(tiny(), str(tmp_path / "page.safetensors"))


# timm's names


@pytest.mark.parametrize("name", ["swin_tiny", "swin_base_window12"])
def test_timm_has_the_names_and_shapes_of_the_backbone(name):
    timm = pytest.importorskip("timm")
    backbone = SwinBackbone(name, train_backbone=True, weights="none")
    model = timm.create_model(SWINS[name].imagenet, pretrained=False)
    theirs = {k: v.shape for k, v in in_published_naming(model.state_dict()).items()}
    ours = {k: v.shape for k, v in backbone.body.state_dict().items() if not k.endswith("relative_position_index")}
    assert {k for k in theirs if k not in ours} == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    assert all(re.match(r"norm[123]\.", k) for k in ours if k not in theirs)
    assert all(theirs[k] == shape for k, shape in ours.items() if k in theirs)


@pytest.mark.parametrize("size", SWINS.values(), ids=SWINS)
def test_timm_knows_the_default_weights_of_every_backbone(size):
    timm = pytest.importorskip("timm")
    assert timm_name(size.imagenet) == size.imagenet
    source = timm.models.get_pretrained_cfg(size.imagenet)
    assert source.url.startswith("https://") and source.hf_hub_id == f"timm/{size.imagenet}"
    assert source.num_classes == (1000 if size.embed_dim == 96 else 21841)  # ImageNet-1k, ImageNet-22k
    assert source.input_size[1] == (384 if size.window_size == 12 else 224)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TINY_NAME, TINY_NAME),
        (f"{TINY_NAME}.ms_in22k", f"{TINY_NAME}.ms_in22k"),
        (f"timm/{TINY_NAME}", TINY_NAME),
        (f"hf_hub:timm/{TINY_NAME}.ms_in1k", f"{TINY_NAME}.ms_in1k"),
        ("swin_large_patch4_window12_384_in22k", "swin_large_patch4_window12_384.ms_in22k"),  # timm's name until 0.8
    ],
)
def test_names_may_have_a_tag_a_prefix_or_an_old_form(given, expected):
    pytest.importorskip("timm")
    assert timm_name(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("swin_tini_patch4_window7_224", rf"no Swin of timm\. Did you mean .*{TINY_NAME}"),
        (f"{TINY_NAME}.ms_in23k", rf"{TINY_NAME}\.ms_in22k"),
        ("swin_tiny", r"Did you mean swin_"),
        ("resnet50", r"resnet50: no such file, and timm's model of this name is not a Swin"),
        ("swinv2_tiny_window8_256", r"not a Swin of the first version"),
        ("what", r"what: no such file, and no Swin of timm.*list_models.*--pretrained_backbone_path"),
    ],
)
def test_other_names_are_answered_with_near_ones(given, message):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        load_swin_weights(tiny(), given)


@pytest.mark.parametrize("given", [f"{TINY_NAME}.pkl", f"./{TINY_NAME}", "timm/swin.pth"])
def test_what_looks_like_a_file_is_never_taken_for_a_name(given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file.*leave both out to download"):
        load_swin_weights(tiny(), given)


def test_an_existing_file_without_suffix_is_read(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    state = classifier_state()
    torch.save(state, TINY_NAME)
    model = tiny()
    load_swin_weights(model, TINY_NAME)
    assert torch.equal(model.patch_embed.proj.weight, state["patch_embed.proj.weight"])


# Downloads


@pytest.fixture
def tiny_default(monkeypatch):
    """The registry with a backbone "tiny" of the sizes `TINY`, whose default weights are those of Swin-T."""
    pytest.importorskip("timm")
    monkeypatch.setitem(swin.SWINS, "tiny", SwinSize(*TINY.values(), f"{TINY_NAME}.ms_in1k"))


def no_network(*_, **__):
    raise urllib.error.URLError("no route to host")


def test_default_weights_are_read_from_the_cache_of_torch_hub(tmp_path, monkeypatch, tiny_default):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    state = classifier_state()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"model": state}, tmp_path / "hub" / "checkpoints" / f"{TINY_NAME}.pth")  # as the authors call it
    backbone = SwinBackbone("tiny", train_backbone=True, weights="default")
    reduction = backbone.body.layers[0].downsample.reduction.weight
    assert torch.equal(reduction, state["layers.0.downsample.reduction.weight"])


def test_the_copy_of_timm_stands_in_when_the_authors_file_cannot_be_had(tmp_path, monkeypatch, timm_model):
    huggingface_hub, safetensors = pytest.importorskip("huggingface_hub"), pytest.importorskip("safetensors.torch")
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        safetensors.save_file(timm_model.state_dict(), tmp_path / filename)
        return str(tmp_path / filename)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = tiny()
    load_swin_weights(model, f"timm/{TINY_NAME}.ms_in22k")
    assert asked == [(f"timm/{TINY_NAME}.ms_in22k", "model.safetensors")]
    expected = timm_model.state_dict()["layers.3.downsample.reduction.weight"]
    assert torch.equal(model.layers[2].downsample.reduction.weight, expected)


def test_a_failed_download_names_the_weights_and_the_ways_out(tmp_path, monkeypatch, tiny_default):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    ways = (
        r"Download https://\S+/swin_tiny_patch4_window7_224\.pth .*--pretrained_backbone_path.*--backbone_weights none"
    )
    with pytest.raises(UserError, match=rf"{TINY_NAME}\.ms_in1k .*no route to host.*no route to host.*{ways}"):
        SwinBackbone("tiny", train_backbone=True, weights="default")


def test_one_process_per_machine_downloads(monkeypatch, tiny_default):
    calls = []
    monkeypatch.setattr(swin_weights, "first_process_first", lambda fetch: calls.append("wait") or fetch())
    monkeypatch.setattr(swin_weights, "_download", lambda name: calls.append(name) or classifier_state())
    SwinBackbone("tiny", train_backbone=True, weights="default")
    assert calls == ["wait", f"{TINY_NAME}.ms_in1k"]
