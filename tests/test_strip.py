"""`main.py --strip`: a smaller file with the same detections."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import main
from tests.cli import run
from tests.mmdet_file import mmdet_state
from tests.tiny import TWO_STAGE
from util.checkpoint import read_checkpoint

DETECTOR = f"{TWO_STAGE} --mixed_selection --num_queries_one2one 10"
SCHEMES = "--num_queries_one2many 20 --k_one2many 2 --aux_heads atss faster_rcnn --roi_samples 16"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One epoch of a detector that has every kind of training-only part."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, f"{DETECTOR} {SCHEMES} --epochs 1 --use_ema --ema_decay 0.5") == 0
    return folder / "checkpoint.pth"


def detections(checkpoint: Path, folder: Path, more: str) -> list[dict]:
    assert run(folder, f"{DETECTOR} {more} --eval --resume {checkpoint}") == 0
    return json.loads((folder / "eval" / "results.json").read_text())


@pytest.mark.parametrize("more", ["", SCHEMES], ids=["without_the_schemes", "with_the_flags_of_training"])
def test_a_stripped_file_detects_the_same(trained: Path, tmp_path: Path, more: str) -> None:
    assert main.main(["--strip", str(trained)]) == 0
    stripped = trained.with_name("checkpoint_inference.pth")
    content = read_checkpoint(stripped)
    assert not {"optimizer", "lr_scheduler", "ema", "rng"} & set(content)
    assert not [name for name in content["model"] if name.startswith("groups.")]
    assert len(content["model"]["query_embed.weight"]) == 10
    assert stripped.stat().st_size < trained.stat().st_size / 3
    whole, small = (detections(file, tmp_path / file.stem, more) for file in (trained, stripped))
    assert whole == small and len(whole) > 0


def test_the_averaged_weights_can_be_taken(trained: Path, capsys) -> None:
    assert main.main(["--strip", str(trained)]) == 0
    assert "--use_ema takes those" in capsys.readouterr().out
    assert main.main(["--strip", str(trained), "--use_ema"]) == 0
    content, stripped = (read_checkpoint(trained.with_name(f"checkpoint{s}.pth")) for s in ("", "_inference"))
    name = "class_embed.0.weight"
    assert torch.equal(stripped["model"][name], content["ema"]["model"][name])
    assert not torch.equal(stripped["model"][name], content["model"][name])
    assert main.main(["--strip", str(trained.with_name("checkpoint_inference.pth")), "--use_ema"]) == 2
    assert "holds no averaged weights" in capsys.readouterr().err


def test_a_published_file_of_mmdet_is_stripped_too(tmp_path: Path) -> None:
    path = tmp_path / "co_deformable.pth"
    torch.save({"meta": {"CLASSES": list("abcd")}, "state_dict": mmdet_state(), "optimizer": {"state": {}}}, path)
    assert main.main(["--strip", str(path)]) == 0
    content = read_checkpoint(tmp_path / "co_deformable_inference.pth")
    assert content["class_names"] == list("abcd") and set(content) == {"model", "class_names"}
    assert "transformer.level_embed" in content["model"]
    assert not [name for name in content["model"] if name.startswith("groups.")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strip", "nowhere.pth"], "checkpoint nowhere.pth does not exist"),
        (["--strip", "a.pth", "--eval", "--resume", "a.pth"], "--strip CHECKPOINT only writes a file"),
    ],
)
def test_mistakes_are_told(capsys, words: list[str], message: str) -> None:
    assert main.main(words) == 2
    assert message in capsys.readouterr().err
