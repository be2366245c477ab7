"""The command line from end to end: what it writes, what it says, what it refuses."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import main
from tests.cli import flags, run
from util.checkpoint import read_checkpoint, write_atomically
from util.evaluation import best_result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of two epochs, drawn and averaged."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "folder"
    assert run(folder, "--use_ema --draw 2 --lr_drop 1 --save_every 2") == 0
    return folder


def refusal(capsys, output_dir, more: str) -> str:
    """Run into an error; return its message."""
    assert run(output_dir, more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


# what a run leaves behind


def test_a_run_leaves_the_files_of_the_family_and_ours(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    expected = {
        "args.json",
        "env.txt",
        "log.txt",
        "checkpoint.pth",
        "checkpoint0000.pth",  # before the drop
        "checkpoint0001.pth",  # every second epoch
        "checkpoint_best.pth",
        "eval/000.pth",
        "eval/latest.pth",
        "eval/results.json",
        "eval/per_class.csv",
        "eval/stats.json",
        "pictures/overview.png",
    }
    assert expected <= names
    assert json.loads((trained / "args.json").read_text())["num_classes"] == 6
    assert "torch: " in (trained / "env.txt").read_text()


def test_the_log_has_the_keys_of_the_family(trained):
    entries = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    for prefix in ("train_", "test_", "ema_test_"):
        for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "loss_ce_unscaled"):
            assert prefix + name in entries[0]
    assert len(entries[0]["test_coco_eval_bbox"]) == 12
    assert entries[0]["train_loss_bbox"] == pytest.approx(5 * entries[0]["train_loss_bbox_unscaled"])
    assert entries[0]["train_lr"] == 0.001 and entries[1]["train_lr"] == pytest.approx(0.0001)
    assert entries[0]["n_parameters"] > 10_000_000


def test_a_checkpoint_knows_its_classes_and_arguments(trained):
    content = read_checkpoint(trained / "checkpoint.pth")
    assert content["class_names"][:2] == ["circle", "square"]
    assert len(content["category_ids"]) == 6
    assert content["args"]["hidden_dim"] == 32
    assert content["epoch"] == 1
    assert content["best"]["epoch"] in (0, 1)


def test_the_best_file_has_the_better_weights_and_evaluates(trained, tmp_path):
    content = read_checkpoint(trained / "checkpoint_best.pth")
    best = content["best"]
    epoch = read_checkpoint(trained / f"checkpoint{best['epoch']:04}.pth")
    better = epoch["ema"]["model"] if best["weights"] == "ema" else epoch["model"]
    assert all(torch.equal(value, better[name]) for name, value in content["model"].items())
    assert run(tmp_path, f"--eval --resume {trained}/checkpoint_best.pth") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"eval.pth", "eval_args.json"} <= names
    assert not {"log.txt", "args.json"} & names  # the record of a training run in this folder stays


def test_an_evaluation_needs_no_flag_of_the_model(trained, tmp_path, capsys):
    what = f"--eval --resume {trained}/checkpoint.pth"
    assert run(tmp_path / "given", what) == 0
    data = "--device cpu --dataset_file synthetic --synthetic_val 5 --synthetic_size 64 64 --test_size 0 --draw 0"
    assert main.main(f"{data} --num_workers 0 --no-eval_curves {what} --output_dir {tmp_path}".split()) == 0
    assert f"from {trained}/checkpoint.pth: --hidden_dim 32" in capsys.readouterr().out
    folders = (tmp_path, tmp_path / "given")
    found, expected = (json.loads((folder / "eval/stats.json").read_text()) for folder in folders)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5)
    assert json.loads((tmp_path / "eval_args.json").read_text())["hidden_dim"] == 32


def test_the_start_tells_device_data_and_the_difference_to_the_recipe(tmp_path, capsys):
    assert run("", "--epochs 1 --grad_accum_steps 2") == 0
    text = capsys.readouterr().out
    assert "device cpu, deformable attention by" in text
    assert "16 training and 5 validation images; 6 classes in 6 outputs: circle, square" in text
    assert "batch 4 = 1 process(es) x 2 x 2" in text
    assert "warning: the recipe assumes batch 32" in text and "linear x0.125" in text
    assert text.rstrip().endswith("nothing was saved: there is no --output_dir")


def test_a_matching_batch_gives_no_warning(capsys):
    assert run("", "--epochs 1 --recipe_batch_size 2 --eval_every 5") == 0
    assert "warning" not in capsys.readouterr().out


def test_scaled_rates_reach_the_optimiser(tmp_path):
    assert run(tmp_path, "--epochs 1 --recipe_batch_size 4 --lr_scale linear --lr_drop 9") == 0
    rates = [g["lr"] for g in read_checkpoint(tmp_path / "checkpoint.pth")["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.0005, 1e-5, 0.00005])


@pytest.mark.parametrize("more", ["--amp", "--use_fp16", "--sgd --clip_max_norm 0", "--backbone_norm train"])
def test_the_other_ways_to_step_train_too(tmp_path, more):
    assert run(tmp_path, f"--epochs 1 --synthetic_train 4 {more}") == 0
    loss = json.loads((tmp_path / "log.txt").read_text())["train_loss"]
    assert 0 < loss < 100


def test_frozen_parts_stay_as_they_are(tmp_path):
    assert run(tmp_path / "a", "--epochs 1 --freeze backbone class_embed") == 0
    trained = read_checkpoint(tmp_path / "a/checkpoint.pth")["model"]
    assert run(tmp_path / "b", "--epochs 1 --freeze backbone class_embed --lr 0.0001") == 0
    other = read_checkpoint(tmp_path / "b/checkpoint.pth")["model"]
    for name, value in trained.items():
        if name.startswith(("backbone.0.body.layer4", "class_embed")):
            assert torch.equal(value, other[name]), name
    assert not torch.equal(trained["input_proj.0.0.weight"], other["input_proj.0.0.weight"])


def test_starting_from_another_run_takes_what_fits_and_lists_the_rest(trained, tmp_path, capsys):
    more = f"--epochs 1 --init_from {trained}/checkpoint.pth --synthetic_classes 4 --init_class_rows"
    assert run(tmp_path, more) == 0
    text = capsys.readouterr().out
    assert "class rows copied by name: circle, square, triangle, star" in text
    assert run("", more.replace(" --init_class_rows", "")) == 0
    assert "class_embed.*.bias: [6] in the file, [4] in the model" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 0


def test_resume_auto_starts_anew_in_an_empty_folder(tmp_path, capsys):
    assert run(tmp_path, "--epochs 1 --resume auto") == 0
    assert "no checkpoint.pth yet, this is a new run" in capsys.readouterr().out


def test_a_published_file_is_evaluated_as_it_is(trained, tmp_path, capsys):
    content = read_checkpoint(trained / "checkpoint.pth")
    torch.save({"model": content["model"], "args": Namespace(lr=1.0)}, tmp_path / "official.pth")
    for name, file in (("own", trained / "checkpoint.pth"), ("official", tmp_path / "official.pth")):
        assert run(tmp_path / name, f"--eval --resume {file}") == 0
    own, official = (json.loads((tmp_path / n / "eval/results.json").read_text()) for n in ("own", "official"))
    assert own == official and len(own) == 5 * 48
    last = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    assert f"test_AP {100 * last['test_coco_eval_bbox'][0]:.1f} " in capsys.readouterr().out


def test_a_file_of_an_https_address_is_fetched_once(trained, tmp_path, monkeypatch):
    fetched = []

    def fetch(url, target):
        fetched.append(url)
        Path(target).write_bytes((trained / "checkpoint_best.pth").read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for url in ("https://example.org/a/best.pth", "https://example.org/a/best.pth", "https://example.org/b/best.pth"):
        assert run("", f"--eval --eval_every 1 --resume {url}") == 0
    assert fetched == ["https://example.org/a/best.pth", "https://example.org/b/best.pth"]


def test_other_classes_than_those_of_the_checkpoint_are_told(trained, tmp_path, capsys):
    content = read_checkpoint(trained / "checkpoint_best.pth")
    write_atomically({**content, "class_names": ["circle", "box", *content["class_names"][2:]]}, tmp_path / "a.pth")
    assert run("", f"--eval --resume {tmp_path}/a.pth") == 0
    assert "1 classes of the checkpoint have other names in these annotations, for example 'box' is 'square'" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("entries", "best"),
    [
        ([(0.1, None), (0.3, None), (0.2, None)], {"ap": 0.3, "epoch": 1, "weights": "model"}),
        ([(0.1, 0.2), (0.2, 0.1)], {"ap": 0.2, "epoch": 0, "weights": "ema"}),
        ([(0.4, 0.4)], {"ap": 0.4, "epoch": 0, "weights": "model"}),
        ([(None, None)], None),
    ],
)
def test_the_best_result_is_the_earliest_highest_ap_of_either_kind_of_weights(entries, best):
    log = []
    for epoch, (plain, averaged) in enumerate(entries):
        numbers = {"test_coco_eval_bbox": plain, "ema_test_coco_eval_bbox": averaged}
        log.append({"epoch": epoch, **{k: [v] * 12 for k, v in numbers.items() if v is not None}})
    assert best_result(log) == best


# what it refuses


def test_an_output_folder_below_a_file_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(main, "build_dataset", lambda *_: pytest.fail("work was done"))
    assert "--output_dir" in refusal(capsys, tmp_path / "file" / "run", "")
    assert "it is a file" in refusal(capsys, tmp_path / "file", "")


def test_a_missing_checkpoint_is_refused(tmp_path, capsys):
    assert "nowhere.pth does not exist" in refusal(capsys, tmp_path, "--resume nowhere.pth")


def test_a_truncated_checkpoint_is_refused_with_another_file(trained, tmp_path, capsys):
    content = (trained / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content[: len(content) // 2])
    write_atomically({}, tmp_path / "checkpoint0000.pth")
    error = refusal(capsys, tmp_path, "--resume auto")
    assert "cut off" in error and "checkpoint0000.pth" in error


def test_a_checkpoint_of_another_model_is_refused_with_the_flag(trained, tmp_path, capsys):
    more = f"--resume {trained}/checkpoint.pth --with_box_refine --two_stage"
    error = refusal(capsys, tmp_path, more)
    assert "is of another model" in error and "leave --two_stage out" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--two_stage", "--two_stage needs --with_box_refine"),
        ("--eval", "--eval needs --resume"),
        ("--freeze nothing_of_this_name", "--freeze nothing_of_this_name: no parameter begins with it"),
        ("--init_from nowhere.pth", "nowhere.pth does not exist"),
        ("--device abacus", "--device abacus: use auto"),
        ("--device meta", "--device meta: use auto"),
        ("--focal_alpha 3", "--focal_alpha 3.0: must be in [0, 1]"),
        ("--num_classes 2", "--num_classes 2: these annotations need 6"),
        ("--nheads 0", "--nheads 0: must be at least 1"),
        ("--recipe_batch_size 0", "--recipe_batch_size 0: must be at least 1"),
        ("--num_workers -1", "--num_workers -1: must be 0 or more"),
        ("--clip_max_norm -1", "--clip_max_norm -1.0: must be 0 or more"),
        ("--train_scales 480 0", "--train_scales [480, 0]: sides must be at least 1 pixel"),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path, capsys, more, message):
    assert message in refusal(capsys, tmp_path, more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_operator_backend_that_is_not_here_is_refused(tmp_path, capsys):
    assert "--ops_backend cuda: " in refusal(capsys, tmp_path, "--ops_backend cuda")


def test_resume_auto_needs_an_output_folder(capsys):
    assert "--resume auto looks into --output_dir" in refusal(capsys, "", "--resume auto")


def test_evaluating_averaged_weights_needs_some(tmp_path, capsys):
    assert run(tmp_path, "--epochs 1 --eval_every 9") == 0
    error = refusal(capsys, tmp_path, "--eval --resume auto --use_ema")
    assert "holds no averaged weights" in error


def test_a_diverged_run_stops_with_advice_and_keeps_the_batch(trained, tmp_path, capsys):
    content = read_checkpoint(trained / "checkpoint.pth")
    content["model"]["input_proj.0.0.weight"].fill_(float("nan"))
    write_atomically({"model": content["model"]}, tmp_path / "broken.pth")
    error = refusal(capsys, tmp_path, f"--resume {tmp_path}/broken.pth --max_nonfinite 3")
    assert "3 non-finite losses in a row" in error and "--lr" in error
    assert len(list(tmp_path.glob("nonfinite_epoch0_step*.pth"))) == 3


def test_a_resumed_run_never_downloads_backbone_weights(trained, tmp_path, monkeypatch):
    seen = []
    build = main.build_model
    monkeypatch.setattr(main, "build_model", lambda args: seen.append(args.backbone_weights) or build(args))
    assert run(tmp_path, f"--backbone_weights default --resume {trained}/checkpoint.pth --use_ema") == 0
    assert seen == ["checkpoint"]


def test_the_parser_of_main_is_the_parser_of_the_project():
    args = main.get_args_parser().parse_args(flags("x"))
    assert (args.hidden_dim, args.output_dir) == (32, "x")
