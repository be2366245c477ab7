"""`main.py --overfit_batch`: passes where a batch can be learned, and says what is wrong where it is not."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

import util.overfit
from datasets import build_dataset, build_transforms
from main import main
from tests.tiny import make_target
from util.args import get_args_parser
from util.errors import UserError
from util.overfit import EPOCHS, Run, as_truth, first_batch, judge, learn, overfit_command
from util.overfit_hints import fates, hints
from util.structures import Detections, ImageBatch
from util.visualize import of_detections, of_target

FLAGS = (
    "--overfit_batch --device cpu --dataset_file synthetic --synthetic_train 8 --synthetic_size 64 64 "
    "--synthetic_objects 1 2 --test_size 0 --backbone resnet18 --backbone_weights none --backbone_norm train "
    "--hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1 --dim_feedforward 32 --num_queries 8 --dropout 0 "
    "--num_feature_levels 3 --batch_size 2 --lr 0.002 --lr_backbone 0.002"
)
BOX = "--with_box_refine --two_stage --query_pos box --dn_number 4 --look_forward_twice"
SCHEMES = {
    "hybrid branch": "--num_queries_one2many 8 --k_one2many 2 --with_box_refine",
    "hybrid epoch": "--hybrid epoch --hybrid_k 2",
    "denoising": BOX,
    "soft matching": "--matcher soft",
    "auxiliary head": "--with_box_refine --two_stage --aux_heads atss",
}


def parse(more: str = "") -> Namespace:
    return get_args_parser().parse_args(f"{FLAGS} {more}".split())


def run_main(folder: Path | None = None, more: str = "") -> int:
    return main(f"{FLAGS} {more}".split() + ([f"--output_dir={folder}"] if folder else []))


def detections(*rows: tuple, image_id: int = 0) -> Detections:
    """A row is (score, label, x0, y0, x1, y1)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(table[:, 0], table[:, 1].long(), table[:, 2:], image_id)


# ---- the command ----


def test_a_tiny_batch_is_learned(tmp_path, capsys):
    assert run_main(tmp_path, "--overfit_steps 100") == 0
    assert "\nPASS after " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["overfit.json", "overfit.png"]  # no checkpoint
    numbers = json.loads((tmp_path / "overfit.json").read_text())
    assert numbers["passed"] and numbers["loss"][-1] < numbers["loss"][0] / 2
    assert numbers["AP50"][0][0] == 0 and numbers["AP50"][-1][0] == len(numbers["loss"]) <= 100
    assert numbers["AP50"][0][1] < 0.9 <= numbers["AP50"][-1][1]
    with Image.open(tmp_path / "overfit.png") as sheet:
        assert sheet.width > 3 * 472 and sheet.height > 2 * 472  # truth, before, after; two images


def test_nothing_is_learned_without_a_rate(capsys):
    assert run_main(None, "--overfit_steps 3 --lr 0 --lr_backbone 0") == 1
    text = capsys.readouterr().out
    assert "\nFAIL after 3 steps: loss 100% of its start (needs 50%)" in text
    assert "  - --lr 0: nothing is trained\n" in text


@pytest.mark.filterwarnings("ignore:.*matching costs are not finite")
def test_losses_that_are_no_numbers_are_a_failure(capsys):
    assert run_main(None, "--overfit_steps 9 --lr 1e30 --clip_max_norm 0 --max_nonfinite 2") == 1
    assert "\nFAIL after 2 steps: 2 non-finite" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_can_be_tested(scheme, capsys):
    assert run_main(None, f"--overfit_steps 2 {SCHEMES[scheme]}") == 1  # two steps are not enough
    assert "step 2/2  loss: " in capsys.readouterr().out


def test_without_data_there_is_nothing_to_learn(capsys):
    assert main(["--overfit_batch", "--device=cpu", "--coco_path=nowhere"]) == 2
    assert "error: --coco_path nowhere is not a folder" in capsys.readouterr().err


def test_it_is_a_test_of_one_process(monkeypatch):
    monkeypatch.setattr(util.overfit.dist, "is_distributed", lambda: True)
    with pytest.raises(UserError, match="--overfit_batch is a test of one process"):
        overfit_command(parse())


# ---- the batch ----


def test_the_batch_is_of_images_with_objects_and_without_augmentation():
    args = parse("--augment detr --synthetic_objects 0 1 --synthetic_train 20")
    dataset = build_dataset("train", args)
    assert any(len(dataset.load(i)[1]["labels"]) == 0 for i in range(20))
    dataset.transforms = build_transforms("val", args)
    (images, targets), (again, _) = (first_batch(dataset, 4, seed=1) for _ in range(2))
    assert [len(t) for t in targets] == [1] * 4 and images.sizes == [(64, 64)] * 4
    assert torch.equal(images.pixels, again.pixels)
    assert torch.equal(images.pixels[0], dataset.load(dataset.image_ids.index(targets[0].image_id))[0])


def test_a_set_without_objects_is_refused():
    args = parse("--synthetic_objects 0 0")
    with pytest.raises(UserError, match="none of 8 training images has an object"):
        first_batch(build_dataset("train", args), 2, seed=0)


@pytest.mark.parametrize(("most", "each"), [(40, 2), (45, 2), (7, 1)])
def test_the_steps_are_a_whole_training_of_so_many_epochs(monkeypatch, most, each):
    epochs = []

    def step(run, train_step, epoch, done):
        epochs.append((epoch, done))
        run.losses.append(1.0)

    monkeypatch.setattr(util.overfit, "_one_step", step)
    monkeypatch.setattr(util.overfit, "judge", lambda run: run.ap50.append((len(run.losses), 0.0)))
    state = Namespace(model=torch.nn.Identity(), criterion=torch.nn.Identity())
    learn(Run(state, None, None, None, None, None, []), most)
    assert [e for e, _ in epochs] == [min(i // each, EPOCHS - 1) for i in range(most)]
    assert [d for _, d in epochs] == [i % each / each for i in range(most)]


# ---- what is said about it ----


def test_detections_equal_to_the_targets_have_an_ap50_of_one(monkeypatch):
    targets = [make_target([[0.5, 0.5, 0.5, 0.5]], [1], 7), make_target([[0.25, 0.25, 0.5, 0.5]], [0], 3)]
    right = [detections((0.9, 1, 16, 16, 48, 48), image_id=7), detections((0.8, 0, 0, 0, 32, 32), image_id=3)]
    truth = as_truth(targets, ["cat", "dog", "N/A"], [4, 9, -1])
    assert [a["bbox"] for a in truth.coco.dataset["annotations"]] == [[16, 16, 32, 32], [0, 0, 32, 32]]
    state = Namespace(class_names=["cat", "dog", "N/A"], category_ids=[4, 9, -1])
    for found, expected in ((right, 1.0), ([right[0], detections(image_id=3)], 0.5)):
        monkeypatch.setattr(util.overfit, "detect", lambda run, found=found: found)
        run = Run(state, None, None, None, torch.device("cpu"), ImageBatch(None, None, []), targets)
        judge(run)
        assert run.ap50 == [(0, pytest.approx(expected, abs=0.01))]


def test_what_is_drawn_lies_on_the_image_of_the_batch_not_of_the_file():
    target = make_target([[0.5, 0.5, 0.5, 0.5]], [1])  # of a file of 64 x 64 pixels
    target.size = (32, 128)
    (truth,) = of_target(target, ["cat", "dog"])
    low, high = of_detections(
        detections((0.9, 1, 16, 16, 48, 48), (0.5, 0, 0, 0, 64, 64), (0.2, 0, 0, 0, 9, 9)), target, ["cat", "dog"], 0.3
    )
    assert truth.box.tolist() == high.box.tolist() == [32, 8, 96, 24]
    assert (truth.text, high.text, low.text) == ("dog", "dog 0.90", "cat 0.50") and truth.color == high.color
    assert low.box.tolist() == [0, 0, 128, 32]


def test_the_fate_of_every_object_is_told():
    target = make_target([[x, 0.5, 0.125, 0.125] for x in (0.125, 0.375, 0.625, 0.875)], [0, 1, 2, 3])
    found = detections(
        (0.9, 0, 4, 28, 12, 36), (0.8, 3, 20, 28, 28, 36), (0.1, 2, 36, 28, 44, 36), (0.9, 3, 0, 0, 9, 9)
    )
    assert fates(target, found) == ["found", "other class", "unsure", "no box"]
    assert fates(target, detections()) == ["no box"] * 4


def test_hints_name_the_rate_the_steps_the_queries_and_the_missed_objects():
    args = parse("--num_queries 1")
    targets = [make_target([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]], [0, 1], image_id=31)]
    found = [detections(*[(0.9, 0, 16, 16, 48, 48)] * 4)]
    rising = [(i, i / 20) for i in range(10)]
    first, crowded, missed, surplus = hints(args, [10.0] * 5 + [4.0] * 5, rising, targets, found, ["cat", "dog"])
    assert first == "AP50 was still rising: give more --overfit_steps than 10"
    assert crowded == "image ids [31] have more objects than --num_queries_one2one 1"
    assert missed.startswith("1 of 2 objects have no box") and missed.endswith("(classes: dog 1; images: 31 1)")
    assert surplus.startswith("2 more detections")
    for last, said in (
        (9.9, "hardly fell (99% of its start): 2 steps are too few (--overfit_steps), --lr 0.002 is too low"),
        (11.0, "--lr 0.002 is too high"),
    ):
        assert said in hints(args, [10.0, last], rising, targets, found, ["cat", "dog"])[0]
