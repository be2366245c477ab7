"""Curves of an evaluation: whose numbers they are, which files they become, and when."""

from __future__ import annotations

import csv
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.confusion import Confusion
from datasets.evaluators import CocoEvaluator
from tests.cli import run
from tests.unit.eval_cases import drawn, evaluate, feed, packages
from tests.unit.test_confusion import CAT, FAR, HERE, truth
from util.errors import UserError
from util.eval_curves import eval_curves, read_eval_curves, write_eval_curves
from util.evaluation import Evaluation

FILES = {"precision_recall.csv", "thresholds.csv", "confusion.csv", "confusions.csv"}
PICTURES = {"pr_curves.png", "confusion.png"}


def found(*rows: tuple) -> list[dict]:
    return [{"image_id": i, "category_id": c, "bbox": list(box), "score": s} for i, c, box, s in rows]


def drawn_evaluator(implementation: str = "pycocotools", **options) -> CocoEvaluator:
    dataset, batch = drawn(0, crowd=0.1, digits=2, **options)
    return feed(CocoEvaluator(dataset, implementation=implementation), batch)


def test_a_curve_known_by_hand():
    """Right at 0.9, wrong at 0.8, right at 0.7 of two objects: precision 1 up to recall 1/2, then 2/3."""
    dataset = truth((1, CAT, HERE), (1, CAT, FAR))
    entries = found((1, CAT, HERE, 0.9), (1, CAT, (200, 0, 9, 9), 0.8), (1, CAT, FAR, 0.7))
    curves = eval_curves(evaluate(dataset, entries)).precision_recall
    expected = np.where(np.arange(101) <= 50, 1, 2 / 3)
    assert list(curves.classes) == ["cat"]  # the dog has no object
    for curve in (curves.at_50, curves.at_75, curves.mean, curves.classes["cat"]):
        np.testing.assert_allclose(curve, expected)


def test_the_means_of_the_curves_are_the_numbers_of_the_evaluation():
    evaluator = drawn_evaluator()
    curves, stats = eval_curves(evaluator).precision_recall, evaluator.summarize()
    for curve, name in ((curves.mean, "AP"), (curves.at_50, "AP50"), (curves.at_75, "AP75")):
        assert curve.mean() == pytest.approx(stats[name], abs=1e-12)
    own = {row.name: row.AP50 for row in evaluator.per_class()}
    assert {name: curve.mean() for name, curve in curves.classes.items()} == pytest.approx(own)


@pytest.mark.parametrize("implementation", packages())
def test_every_package_gives_the_same_curves_thresholds_and_matrix(implementation, tmp_path):
    mine, reference = eval_curves(drawn_evaluator(implementation)), eval_curves(drawn_evaluator())
    np.testing.assert_allclose(mine.precision_recall.mean, reference.precision_recall.mean, rtol=0, atol=1e-12)
    assert mine.points == reference.points
    assert (mine.confusion.counts == reference.confusion.counts).all()


def test_no_object_at_all_is_no_curve(tmp_path):
    curves = eval_curves(evaluate(truth(), found((1, CAT, HERE, 0.9))))
    assert not curves.precision_recall.classes and np.isnan(curves.precision_recall.mean).all()
    write_eval_curves(curves, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | PICTURES


def test_classes_of_the_same_name_keep_a_curve_each():
    evaluator = drawn_evaluator()
    evaluator.dataset.class_names = ["kind", "kind", "other"]
    assert list(eval_curves(evaluator).precision_recall.classes) == ["kind (3)", "kind (7)", "other"]


def test_the_matrix_can_have_a_threshold_of_its_own():
    curves = eval_curves(drawn_evaluator(), score=0.75)
    assert curves.confusion.threshold == 0.75 and curves.points[0].common_threshold == 0.75


def test_tables_hold_what_was_counted_and_can_be_read_again(tmp_path):
    curves = eval_curves(drawn_evaluator())
    text = write_eval_curves(curves, tmp_path)
    assert f"score {curves.confusion.threshold:g}" in text and str(tmp_path) in text
    assert {path.name for path in tmp_path.iterdir()} == FILES | PICTURES
    with open(tmp_path / "confusion.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["truth", "kind 3", "kind 7", "kind 11", "missed"]
    assert [row[0] for row in rows[1:]] == ["kind 3", "kind 7", "kind 11", "background"]
    again = read_eval_curves(tmp_path)
    assert again.points == curves.points
    assert (again.confusion.counts == curves.confusion.counts).all()
    assert again.confusion.mistaken() == curves.confusion.mistaken()
    np.testing.assert_allclose(again.precision_recall.mean, curves.precision_recall.mean, atol=1e-4)


def test_tables_that_do_not_fit_together_are_refused(tmp_path):
    write_eval_curves(eval_curves(drawn_evaluator()), tmp_path)
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    (tmp_path / "confusion.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="do not fit together"):
        read_eval_curves(tmp_path)


def test_without_matplotlib_there_are_tables_and_the_way_to_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in write_eval_curves(eval_curves(drawn_evaluator()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.parametrize("classes", [1, 26, 80, 130])
def test_any_number_of_classes_has_a_picture(classes, tmp_path):
    from util.eval_figures import draw_confusion

    counts = np.random.default_rng(0).integers(0, 3, (classes + 1, classes + 1))
    draw_confusion(Confusion([f"${i} a long name of a class" for i in range(classes)], counts, 0.5), tmp_path / "c.png")
    width, height = Image.open(tmp_path / "c.png").size
    assert 300 < height < 2600 and 300 < width < 2800


# ---- when they are made ----


def evaluation(tmp_path, monkeypatch, **options) -> Evaluation:
    dataset, batch = drawn(0, images=3)

    def instead_of_a_model(*args, **more):
        return feed(args[4], batch).summarize(), []

    monkeypatch.setattr("util.evaluation.evaluate", instead_of_a_model)
    loader = SimpleNamespace(dataset=dataset)
    return Evaluation(loader, None, None, None, torch.device("cpu"), tmp_path, draw=0, **options)


@pytest.mark.parametrize(
    ("curves", "when", "expected"),
    [(True, {}, False), (True, {"last": True}, True), (True, {"final": True}, True), (False, {"final": True}, False)],
)
def test_curves_are_made_at_the_last_evaluation_and_can_be_switched_off(curves, when, expected, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # tables are enough here
    evaluation(tmp_path, monkeypatch, curves=curves).run(torch.nn.Linear(1, 1), None, 0, **when)
    assert ((tmp_path / "eval" / "confusion.csv").is_file()) == expected


def test_averaged_weights_have_curves_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    averaged = SimpleNamespace(module=torch.nn.Linear(1, 1))
    evaluation(tmp_path, monkeypatch, curves=True).run(torch.nn.Linear(1, 1), averaged, 0, last=True)
    assert all((tmp_path / folder / "thresholds.csv").is_file() for folder in ("eval", "eval_ema"))


def test_a_training_ends_with_curves_and_an_evaluation_makes_them_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    tables = [tmp_path / "eval" / name for name in sorted(FILES)]
    assert run(tmp_path, "--epochs 1 --synthetic_train 2 --eval_curves") == 0
    for path in tables:
        path.unlink()
    chosen = f"--eval --resume {tmp_path}/checkpoint.pth --eval_curves --confusion_score 0.25"
    assert run(tmp_path, chosen) == 0
    assert all(path.is_file() for path in tables)
    assert read_eval_curves(tmp_path / "eval").confusion.threshold == 0.25


# ---- results of an earlier evaluation ----


def test_stored_results_give_the_same_evaluation(tmp_path):
    evaluator = drawn_evaluator()
    evaluator.save(tmp_path)
    again = CocoEvaluator(evaluator.dataset, implementation="pycocotools")
    again.load(tmp_path / "results.json")
    assert again.summarize() == evaluator.summarize() | {"images": len(again.rows)}
    assert again.results() == evaluator.results()


@pytest.mark.parametrize("content", ["", '{"a": 1}', '[{"image_id": 1}]', "[1]"])
def test_a_file_that_is_no_list_of_results_is_named(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json is no COCO results list"):
        CocoEvaluator(truth(), implementation="pycocotools").load(tmp_path / "results.json")


@pytest.mark.parametrize("odd", [{"image_id": 99}, {"category_id": 5}])
def test_results_of_other_data_are_refused(odd, tmp_path):
    (tmp_path / "results.json").write_text(str([found((1, CAT, HERE, 0.5))[0] | odd]).replace("'", '"'))
    with pytest.raises(UserError, match="it is of other data"):
        CocoEvaluator(truth(), implementation="pycocotools").load(tmp_path / "results.json")
