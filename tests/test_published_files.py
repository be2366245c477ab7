"""Files in the form of the published repositories evaluate by `--resume FILE --eval`, with no conversion step."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from datasets.coco_names import COCO_NAMES
from models import build_model
from tests.conftest import CASES, ROOT
from tests.golden import case
from tests.mmdet_file import mmdet_file, mmdet_state
from tests.test_configs import flags_of, parsed
from tests.tiny import TINY
from tests.unit.infer_cases import published
from util.checkpoint import load_weights

# Published file (drawn weights under its names and shapes) and the preset that evaluates it.
FILES = {
    "ddetr_base": "deformable_detr/r50",
    "ddetr_single_scale": "deformable_detr/single_scale",
    "ddetr_single_scale_dc5": "deformable_detr/single_scale_dc5",
    "ddetr_refine": "deformable_detr/refine",
    "ddetr_two_stage": "deformable_detr/two_stage",
    "hdetr_baseline": "h_detr/baseline_r50_12ep",
    "hdetr_tricks_only": "h_detr/tricks_r50_12ep",
    "hdetr_r50_hybrid_official": "h_detr/tricks_r50_12ep",
}


# Released files whose names and shapes are in one case, and the preset that evaluates each.
RELEASED = {
    "dab_deformable_r50": "dab_dino/dab_deformable_r50_50ep",
    "dino_4scale_r50": "dab_dino/dino_4scale_r50_12ep",
    "dino_5scale_r50": "dab_dino/dino_5scale_r50_36ep",
}


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images in COCO's layout with COCO's 80 categories."""
    folder = tmp_path_factory.mktemp("coco")
    (folder / "val2017").mkdir()
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number, (height, width) in enumerate([(96, 128), (77, 60)], start=1):
        pixels = np.random.RandomState(number).randint(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / "val2017" / f"{number:012}.png")
        images.append({"id": number, "file_name": f"{number:012}.png", "height": height, "width": width})
        box = [5.0, 6.0, 30.0, 40.0]
        annotations.append(
            {"id": number, "image_id": number, "category_id": 90, "bbox": box, "area": 1200.0, "iscrowd": 0}
        )
    categories = [{"id": i, "name": name} for i, name in COCO_NAMES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_published_file_evaluates_with_its_preset(name: str, coco_folder: Path, tmp_path: Path) -> None:
    meta = json.loads((CASES / f"{name}.json").read_text())
    state = case.checkpoint(meta)
    content = {
        "model": state,
        "optimizer": {},
        "lr_scheduler": {},
        "epoch": 49,
        "args": Namespace(lr=2e-4, eval=False),
    }
    torch.save(content, tmp_path / "published.pth")
    queries = str(meta["flags"].get("num_queries_one2one", meta["flags"].get("num_queries", 300)))
    _evaluates(FILES[name], coco_folder, tmp_path, "--num_queries", queries, classes=meta["num_classes"])


@pytest.mark.parametrize("name", RELEASED)
def test_released_file_of_dab_and_dino_evaluates_with_its_preset(name: str, coco_folder: Path, tmp_path: Path) -> None:
    released = json.loads((CASES / "dino_checkpoint_names.json").read_text())["models"][name]
    meta = {"checkpoint": released["tensors"], "aliases": released["aliases"], "weights": {"seed": 0}}
    state = case.checkpoint(meta)
    torch.save({"model": {f"module.{n}": value for n, value in state.items()}}, tmp_path / "published.pth")
    _evaluates(RELEASED[name], coco_folder, tmp_path, classes=len(state["class_embed.0.bias"]))


@pytest.mark.parametrize("name", ["ddetr_single_scale_dc5", "ddetr_two_stage"])
def test_a_published_file_with_its_arguments_evaluates_without_a_preset(
    name, coco_folder: Path, tmp_path: Path
) -> None:
    meta = json.loads((CASES / f"{name}.json").read_text())
    args = published(**meta["flags"] | {"num_queries": 300})
    torch.save({"model": case.checkpoint(meta), "args": args}, tmp_path / "published.pth")
    _evaluates(FILES[name], coco_folder, tmp_path, classes=meta["num_classes"], given=False)


def _evaluates(preset: str, coco_folder: Path, tmp_path: Path, *more: str, classes: int, given: bool = True) -> None:
    """Evaluate `published.pth` and compare the written results with those of the model that the preset describes.

    `given`: the preset stands on the command line.
    """
    data = ["--coco_path", str(coco_folder), "--test_size", "96", "--device", "cpu", "--num_workers", "0"]
    file = ["--eval", "--resume", str(tmp_path / "published.pth"), "--output_dir", str(tmp_path / "out")]
    flags = flags_of(ROOT / "configs" / f"{preset}.sh", *more, *data, *file)
    assert main.main(flags if given else [*data, *file]) == 0

    args = parsed([*flags, "--backbone_weights", "none", "--num_classes", str(classes)])
    model, _, postprocessor = build_model(args)
    load_weights(model.eval(), tmp_path / "published.pth")
    found = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    expected = _detect(args, model, postprocessor)
    known = [d for d in expected if d[1] in COCO_NAMES]
    assert len(found) == len(known)
    for ours, (image_id, category, score) in zip(found, known):
        assert ours["image_id"] == image_id and ours["category_id"] == category
        assert ours["score"] == pytest.approx(score, abs=1e-4)


def test_co_detr_file_evaluates_with_the_classes_in_the_order_of_their_ids(coco_folder: Path, tmp_path: Path) -> None:
    published = mmdet_file(mmdet_state(classes=80), COCO_NAMES.values())
    torch.save(published, tmp_path / "co.pth")
    flags = TINY.replace("--num_classes 4", "--with_box_refine --two_stage --mixed_selection").split()
    flags += ["--coco_path", str(coco_folder), "--test_size", "96", "--device", "cpu", "--num_workers", "0"]
    flags += ["--eval", "--resume", str(tmp_path / "co.pth"), "--output_dir", str(tmp_path / "out")]
    assert main.main(flags) == 2  # labels are COCO's ids: 91 outputs
    flags += ["--category_ids", "contiguous"]
    assert main.main(flags) == 0

    args = parsed([*flags, "--num_classes", "80"])
    model, _, postprocessor = build_model(args)
    load_weights(model.eval(), tmp_path / "co.pth")
    found = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    expected = _detect(args, model, postprocessor)
    assert len(expected) == 2 * 100
    ids = sorted(COCO_NAMES)
    assert [(d["image_id"], d["category_id"]) for d in found] == [(image, ids[label]) for image, label, _ in expected]
    assert [d["score"] for d in found] == pytest.approx([score for *_, score in expected], abs=1e-4)


@torch.no_grad()
def _detect(args: Namespace, model: torch.nn.Module, postprocessor: torch.nn.Module) -> list[tuple[int, int, float]]:
    """Return (image id, label, score) of every detection, image by image."""
    from datasets import build_dataset, collate

    dataset, result = build_dataset("val", args), []
    assert dataset.num_classes == args.num_classes
    for i in range(len(dataset)):
        images, (target,) = collate([dataset[i]])
        (detections,) = postprocessor(model(images), [target.orig_size], [target.image_id])
        result += [(target.image_id, int(c), float(s)) for c, s in zip(detections.labels, detections.scores)]
    return result
