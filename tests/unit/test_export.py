"""`main.py --export`: files for other programs that compute what the model computes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import main
from models import build_model
from models.exported import ExportedDetector
from tests.tiny import tiny_args
from util.checkpoint import native_weights, read_checkpoint
from util.environment import plain_args
from util.errors import UserError
from util.export import export_command, need_open_sizes, record
from util.export_check import (
    Comparison,
    OnnxFile,
    TorchFile,
    _ranking,
    check_file,
    compare,
    drawn,
    onnx_operators,
    refuse_foreign,
)
from util.stored_flags import build_trained, flags_of

SMALL = "--enc_layers 1 --dec_layers 1 --num_queries 12 --num_feature_levels 3"
TWO_STAGE = f"{SMALL} --two_stage --with_box_refine --mixed_selection"
TRAINING_ONLY = "--num_queries_one2many 20 --k_one2many 2 --aux_heads atss"
DINO = f"{TWO_STAGE} --query_pos box --look_forward_twice --decoder_norm --share_heads --dn_number 4"
NAMES = ["cat", "dog", "cow", "emu"]


def save(folder: Path, flags: str) -> Path:
    """Write a checkpoint whose scores and boxes differ: fresh models say the same everywhere."""
    args = tiny_args(flags)
    model = build_model(args)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name or "bbox_embed" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    path = folder / "trained.pth"
    content = {"format": 1, "model": model.state_dict(), "args": plain_args(args), "epoch": 3}
    torch.save(content | {"class_names": NAMES, "category_ids": [3, 5, 8, 9]}, path)
    return path


def wrapped(checkpoint: Path) -> ExportedDetector:
    """Return the model of a checkpoint as it is exported."""
    content = read_checkpoint(checkpoint)
    flags = flags_of(content, native_weights(content, str(checkpoint)))
    return ExportedDetector(build_trained(content, str(checkpoint), flags)[0], topk=10).eval()


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory) -> Path:
    """Folder with a checkpoint of a two-stage model and `model.onnx` for any size, which the command found equal."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    try:
        need_open_sizes()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("two_stage")
    checkpoint = save(folder, f"{TWO_STAGE} {TRAINING_ONLY}")
    command = ["--export", "onnx", "--export_dynamic", "--export_size", "128", "128", "--export_topk", "10"]
    assert main.main([*command, "--resume", str(checkpoint), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """The same for DINO, a fixed size and `model.pt2`."""
    folder = tmp_path_factory.mktemp("dino")
    command = ["--export", "torch", "--export_size", "70", "90", "--export_topk", "10"]
    assert main.main([*command, "--resume", str(save(folder, DINO)), "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def loaded(dino: Path) -> TorchFile:
    """The file of DINO; loading takes a second or two."""
    return TorchFile(dino / "model.pt2")


@pytest.mark.parametrize("case", [(1, 192, 256), (3, 128, 192)])
def test_an_onnx_file_for_any_size_detects_what_the_model_detects(two_stage: Path, case) -> None:
    row = compare("", OnnxFile(two_stage / "model.onnx"), wrapped(two_stage / "trained.pth"), *drawn(*case, full=False))
    assert row.passed and row.box < 0.05 and row.score < 1e-4


def test_an_onnx_file_holds_standard_operators_only_and_no_grid_sample(two_stage: Path) -> None:
    import onnx

    operators = onnx_operators(onnx.load(two_stage / "model.onnx"))
    assert {"::Gather", "::TopK"} <= set(operators)
    assert all(name.startswith("::") for name in operators) and "::GridSample" not in operators


def test_an_older_pytorch_is_told_that_it_cannot_export_open_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    monkeypatch.setattr("util.export.need_packages", lambda: None)
    args = Namespace(export="onnx", export_dynamic=True, ops_backend="auto", output_dir=str(tmp_path), resume="x.pth")
    with pytest.raises(UserError, match=r"needs PyTorch 2\.8 or later, found 2\.6\.0.*leave out --export_dynamic"):
        export_command(args)


def test_training_only_parts_are_not_in_the_file(two_stage: Path) -> None:
    import onnx

    names = [entry.name for entry in onnx.load(two_stage / "model.onnx").graph.initializer]
    assert any("decoder" in name for name in names) and not [name for name in names if "groups" in name]


def test_a_json_file_says_how_to_feed_the_model(two_stage: Path, dino: Path) -> None:
    facts = json.loads((two_stage / "model.json").read_text())
    assert facts["class_names"] == NAMES and facts["category_ids"] == [3, 5, 8, 9]
    assert facts["inputs"]["images"]["shape"] == ["batch", 3, "height", "width"]
    assert facts["canvas"]["multiple_of"] == 32 and facts["postprocessing"]["topk"] == 10
    assert json.loads((dino / "model.json").read_text())["inputs"]["images"]["shape"] == [1, 3, 70, 90]


def test_a_saved_torch_graph_is_loaded_and_detects_what_the_model_detects(dino: Path, loaded: TorchFile) -> None:
    images, sizes = drawn(1, 70, 90, full=False)
    boxes, scores, labels = loaded(images, sizes)
    assert boxes.shape == (1, 10, 4) and scores.shape == labels.shape == (1, 10)
    assert bool((scores.diff() <= 0).all()) and labels.max() < 4
    assert compare("", loaded, wrapped(dino / "trained.pth"), images, sizes).passed


def test_what_lies_beside_an_image_is_not_read(loaded: TorchFile) -> None:
    images, _ = drawn(1, 70, 90, full=False)
    other, sizes = images.clone(), torch.tensor([[50, 61]])
    other[:, :, 50:], other[:, :, :, 61:] = 7, 250
    for a, b in zip(loaded(images, sizes), loaded(other, sizes)):
        assert torch.equal(a, b)


def test_a_file_of_another_model_is_found_out(dino: Path, loaded: TorchFile, monkeypatch) -> None:
    other = wrapped(dino / "trained.pth")
    with torch.no_grad():
        other.detector.bbox_embed[0].layers[-1].bias += 0.1
    monkeypatch.setattr("util.export_check.TorchFile", lambda path: loaded)
    with pytest.raises(UserError, match="does not compute what the model computes"):
        check_file(dino / "model.pt2", other, [(1, 70, 90)])


def test_the_model_is_compared_under_the_ranking_of_the_file(dino: Path, loaded: TorchFile) -> None:
    model, images = wrapped(dino / "trained.pth"), drawn(1, 70, 90, full=True)
    loaded(*images)

    class Swapped:
        """Stands for a runtime that ranks the first proposal last."""

        orders = [loaded.orders[0].roll(1, 1)]

        def __call__(self, *inputs):
            with torch.no_grad(), _ranking(self.orders, Comparison("")):
                return model(*inputs)

    row = compare("", Swapped(), model, *images)
    assert row.box == row.score == row.labels == 0
    assert row.moved > 1 and row.gap > 0


def test_a_canvas_with_fewer_cells_than_queries_is_refused() -> None:
    many = f"{TWO_STAGE} --num_queries 200"
    model = ExportedDetector(build_model(tiny_args(many))[0], topk=10).eval()
    with pytest.raises(UserError, match="fewer cells than the model has queries"):
        record(model, batch=1, size=(64, 64), multiple=32)


@pytest.mark.parametrize("name", ["ai.onnx::GridSample", "::GridSample", "assigndetr.ms_deform_attn.default"])
def test_operators_that_other_runtimes_lack_or_compile_wrongly_are_refused(name: str) -> None:
    refuse_foreign(["::Gather", "aten.add.Tensor", "<built-in function mul>"], Path("model.onnx"))
    with pytest.raises(UserError, match="holds"):
        refuse_foreign(["::Gather", name], Path("model.onnx"))


def test_missing_packages_are_named_with_the_line_to_type(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main.main(["--export", "onnx", "--resume", "x.pth", "--output_dir", str(tmp_path)]) == 2
    assert "needs onnxscript: pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--export onnx", "--export needs --resume"),
        ("--export onnx --resume x.pth --output_dir y --eval", "leave out --eval"),
        ("--export_size 64 64", "add --export onnx"),
        ("--export onnx --resume x.pth --output_dir y --export_opset 11", "18 to 23"),
        ("--export onnx --resume x.pth --output_dir y --export_dynamic --export_batch 2", "leave out --export_batch"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: str, message: str, capsys) -> None:
    assert main.main(flags.split()) == 2
    assert message in capsys.readouterr().err
