"""The twelve numbers: published ones, a rule anybody can rebuild, and the corners that crash pycocotools."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from pycocotools.cocoeval import COCOeval

from datasets.base import silent_coco
from datasets.coco import CocoDetection
from datasets.evaluators import METRICS, CocoEvaluator
from datasets.transforms import eval_transforms
from tests.unit.eval_cases import assert_same, detections, evaluate, packages, target_of
from tests.unit.small_coco import annotation, content, read
from util.structures import Detections

each = pytest.mark.parametrize("implementation", packages())


def truth(dataset, score: float = 1.0) -> list[dict]:
    """Return the annotations, without crowd, as results."""
    return [{**a, "score": score} for a in dataset.coco.dataset["annotations"] if not a["iscrowd"]]


def rule_d(dataset) -> list[dict]:
    """Return the degraded truth of the shared data's README: some objects missed, boxes moved right."""
    entries = []
    for a in truth(dataset):
        if a["id"] % 11:
            x, y, w, h = a["bbox"]
            score = ((a["id"] * 7919) % 1000 + 1) / 1001
            entries.append({**a, "bbox": [x + (a["id"] % 5) / 20 * w, y, w, h], "score": score})
    return entries


def real(shared_data, name: str) -> CocoDetection:
    folder = shared_data / name
    transforms = eval_transforms(test_size=0, max_size=1333)
    return CocoDetection(folder / "images", folder / "annotations/instances_val.json", transforms=transforms)


RULE_D = {
    "bccd": {"AP": 0.545052, "AP50": 0.927393, "AP75": 0.356238, "APs": 0.698270, "APm": 0.515663, "APl": 0.555911,
             "AR100": 0.645191},
    "coco128": {"AP": 0.581254, "AP50": 0.863290, "AP75": 0.470432, "APs": 0.535105, "APm": 0.610978, "APl": 0.601866,
                "AR100": 0.606355},
}  # fmt: skip


@each
@pytest.mark.parametrize("name", RULE_D)
def test_degraded_truth_of_real_data_gives_the_reference_numbers(shared_data, name, implementation):
    dataset = real(shared_data, name)
    numbers = evaluate(dataset, rule_d(dataset), implementation).summarize()
    assert {key: round(numbers[key], 6) for key in RULE_D[name]} == RULE_D[name]
    assert numbers["images"] == len(dataset)


@each
@pytest.mark.parametrize("name", RULE_D)
def test_the_truth_of_real_data_scores_one(shared_data, name, implementation):
    dataset = real(shared_data, name)
    numbers = evaluate(dataset, truth(dataset), implementation).summarize()
    assert [numbers[key] for key in ("AP", "AP50", "AP75", "AR100")] == pytest.approx([1, 1, 1, 1], abs=1e-9)


@each
def test_the_published_fake_results_give_the_published_numbers(shared_data, implementation):
    folder = shared_data / "coco_val2014_100" / "annotations"
    coco = silent_coco(json.loads((folder / "instances_val2014_100.json").read_text()))
    # The images of this set are not here, so there is no data set: the evaluator needs only these four facts.
    dataset = SimpleNamespace(
        coco=coco,
        image_ids=sorted(coco.imgs),
        category_ids=sorted(coco.cats),
        class_names=[coco.cats[i]["name"] for i in sorted(coco.cats)],
    )
    entries = json.loads((folder / "instances_val2014_fakebbox100_results.json").read_text())
    numbers = evaluate(dataset, entries, implementation).summarize()
    published = [0.5046, 0.6970, 0.5730, 0.5856, 0.5194, 0.5014, 0.3868, 0.5937, 0.5954, 0.6398, 0.5664, 0.5643]
    assert [round(number, 4) for number in numbers["coco_eval_bbox"]] == published
    assert [numbers[name] for name in METRICS] == numbers["coco_eval_bbox"]


@each
def test_every_package_gives_the_arrays_of_pycocotools(shared_data, implementation):
    dataset = real(shared_data, "coco128")
    reference = evaluate(dataset, rule_d(dataset), "pycocotools")
    assert_same(evaluate(dataset, rule_d(dataset), implementation).evaluated(), reference.evaluated())


# ---- by hand ----

TWO_IMAGES = [
    annotation(1, 1, [0, 0, 10, 10]),
    annotation(2, 2, [5, 5, 10, 10]),
    annotation(3, 2, [20, 5, 10, 10], category_id=9),
]


@each
def test_a_missed_class_halves_the_mean(tmp_path, implementation):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluator = evaluate(dataset, truth(dataset)[:2], implementation)
    numbers = evaluator.summarize()
    assert numbers["AP"] == pytest.approx(0.5) and numbers["APs"] == pytest.approx(0.5)
    assert numbers["APm"] == numbers["APl"] == -1  # there is no such object
    assert [row._asdict() for row in evaluator.per_class()] == [
        {
            "category_id": 5,
            "name": "kind 5",
            "AP": pytest.approx(1),
            "AP50": pytest.approx(1),
            "AR100": 1,
            "objects": 2,
        },
        {"category_id": 9, "name": "kind 9", "AP": 0, "AP50": 0, "AR100": 0, "objects": 1},
    ]


@each
def test_no_detection_at_all_gives_zeros(tmp_path, implementation):
    evaluator = evaluate(read(tmp_path, content(TWO_IMAGES)), [], implementation)
    numbers = evaluator.summarize()
    # Small objects only: the numbers of the other sizes do not exist.
    assert numbers["coco_eval_bbox"] == [0, 0, 0, 0, -1, -1, 0, 0, 0, 0, -1, -1] and numbers["images"] == 2
    assert [row.AP for row in evaluator.per_class()] == [0, 0]


@each
def test_an_evaluator_that_saw_no_image_gives_zeros_for_zero_images(tmp_path, implementation):
    numbers = CocoEvaluator(read(tmp_path, content(TWO_IMAGES)), implementation=implementation).summarize()
    assert numbers["AP"] == 0 and numbers["images"] == 0


@each
def test_annotation_id_zero_is_found_like_any_other(tmp_path, implementation):
    dataset = read(tmp_path, content([annotation(0, 1, [0, 0, 10, 10])]))
    assert evaluate(dataset, truth(dataset), implementation).summarize()["AP"] == pytest.approx(1)


@each
def test_missing_area_and_iscrowd_do_not_stop_the_evaluation(tmp_path, implementation):
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 10, 10], area=None, iscrowd=None)]))
    assert evaluate(dataset, truth(dataset), implementation).summarize()["AP"] == pytest.approx(1)


@each
def test_a_detection_inside_a_crowd_is_no_mistake(tmp_path, implementation):
    crowd = annotation(2, 1, [20, 0, 20, 20], iscrowd=1)
    dataset = read(tmp_path, content([annotation(1, 1, [0, 0, 10, 10]), crowd]))
    inside = {"image_id": 1, "category_id": 5, "bbox": [25, 5, 5, 5], "score": 1.0}
    assert evaluate(dataset, [*truth(dataset, 0.5), inside], implementation).summarize()["AP"] == pytest.approx(1)


def test_only_the_images_of_the_data_set_count(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES))
    dataset.image_ids = [1]
    evaluator = evaluate(dataset, truth(dataset))
    assert evaluator.summarize()["AP"] == pytest.approx(1)
    assert [row.objects for row in evaluator.per_class()] == [1, 0]


def test_only_the_best_topk_detections_are_kept(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES))
    entries = [{**entry, "image_id": 1, "score": s} for entry, s in zip(truth(dataset), (0.2, 0.9, 0.5))]
    kept = evaluate(dataset, entries, topk=2).results()
    assert [entry["score"] for entry in kept] == pytest.approx([0.9, 0.5])


def test_results_are_category_ids_and_xywh_of_the_file(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES), category_ids="raw")
    evaluator = CocoEvaluator(dataset)
    boxes = torch.tensor([[1.0, 2.0, 11.0, 7.0], [0.0, 0.0, 5.0, 5.0]])
    # Label 3 stands for no category in this 10-slot numbering and drops out.
    evaluator.update([Detections(torch.tensor([0.5, 0.25]), torch.tensor([9, 3]), boxes)], [target_of(2)])
    assert evaluator.results() == [{"image_id": 2, "category_id": 9, "bbox": [1, 2, 10, 5], "score": 0.5}]


def test_an_image_that_comes_twice_counts_once(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluator = evaluate(dataset, truth(dataset))
    evaluator.update([detections(dataset, truth(dataset)[:1])], [target_of(1)])
    assert len(evaluator.results()) == 3 and evaluator.summarize()["images"] == 2


def test_new_detections_change_the_numbers(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluator = CocoEvaluator(dataset)
    assert evaluator.summarize()["AP"] == 0
    for image_id in (1, 2):
        found = [entry for entry in truth(dataset) if entry["image_id"] == image_id]
        evaluator.update([detections(dataset, found)], [target_of(image_id)])
    assert evaluator.summarize()["AP"] == pytest.approx(1)


def test_saved_results_can_be_evaluated_by_pycocotools(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluator = evaluate(dataset, truth(dataset))
    evaluator.save(tmp_path / "eval")
    evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(str(tmp_path / "eval" / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats.tolist() == evaluator.summarize()["coco_eval_bbox"]
    with open(tmp_path / "eval" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["category_id"], row["name"], row["objects"]) for row in rows] == [
        ("5", "kind 5", "2"),
        ("9", "kind 9", "1"),
    ]


@each
def test_saved_arrays_load_without_pickle_and_hold_the_precision(tmp_path, implementation):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluator = evaluate(dataset, truth(dataset)[:2], implementation)
    evaluator.save_eval(tmp_path / "eval.pth")
    stored = torch.load(tmp_path / "eval.pth", weights_only=True)
    assert stored["precision"].shape == (10, 101, 2, 4, 3) and stored["recall"].shape == (10, 2, 4, 3)
    assert stored["category_ids"] == [5, 9]
    assert stored["precision"][:, :, 0, 0, -1].mean() == pytest.approx(1)


def test_the_table_names_every_class(tmp_path):
    dataset = read(tmp_path, content(TWO_IMAGES[:2]))
    lines = evaluate(dataset, truth(dataset)).table().splitlines()
    assert lines[1].split() == ["kind", "5", "2", "100.0", "100.0", "100.0"]
    assert lines[2].split() == ["kind", "9", "0", "-", "-", "-"]


def test_evaluation_is_silent(tmp_path, capsys):
    dataset = read(tmp_path, content(TWO_IMAGES))
    evaluate(dataset, truth(dataset)).summarize()
    assert not capsys.readouterr().out
