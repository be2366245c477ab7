"""Every package gives the same numbers, whatever the data, in whatever order and from however many processes."""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datasets.base import silent_coco
from datasets.eval_backends import BACKENDS, find_backend
from datasets.evaluators import CocoEvaluator
from tests.unit.eval_cases import assert_same, drawn, feed, packages, target_of
from util.args import get_args_parser
from util.errors import UserError
from util.evaluation import Evaluation
from util.structures import Detections

each = pytest.mark.parametrize("implementation", packages())

CASES = {
    "plain": {},
    "tied scores": {"digits": 1},
    "images without objects": {"objects": (0, 1)},
    "images without detections": {"found": (0, 1)},
    "neither objects nor detections": {"objects": (0, 0), "found": (0, 0)},
    "crowd regions": {"crowd": 0.4, "digits": 2},
    "categories without objects": {"classes_with_objects": 1},
    "more than a hundred detections": {"images": 4, "found": (250, 350), "digits": 2, "crowd": 0.2},
    "images in no order": {"unordered": True, "digits": 1},
}


def evaluator_of(dataset, implementation: str) -> CocoEvaluator:
    return CocoEvaluator(dataset, topk=300, implementation=implementation)


@cache
def by_pycocotools(case: str, seed: int) -> CocoEvaluator:
    dataset, batch = drawn(seed, **CASES[case])
    return feed(evaluator_of(dataset, "pycocotools"), batch)


@each
@pytest.mark.parametrize("case", CASES)
def test_all_arrays_are_those_of_pycocotools(case, implementation):
    for seed in range(2):
        dataset, batch = drawn(seed, **CASES[case])
        reference = by_pycocotools(case, seed)
        ours = feed(evaluator_of(dataset, implementation), batch, size=1 + 2 * seed)
        assert_same(ours.evaluated(), reference.evaluated())
        assert ours.results() == reference.results()
        assert ours.per_class() == [pytest.approx(row, abs=1e-12) for row in reference.per_class()]


def test_the_drawn_cases_are_what_they_are_called():
    dataset, batch = drawn(0, **CASES["tied scores"])
    assert max(len(found.scores) - len(found.scores.unique()) for found, _ in batch) > 5
    dataset, batch = drawn(0, **CASES["more than a hundred detections"])
    assert len(feed(evaluator_of(dataset, "pycocotools"), batch).results()) > 4 * 250 - 1
    assert sum(a["iscrowd"] for a in dataset.coco.anns.values()) > 0
    dataset, _ = drawn(0, **CASES["images without objects"])
    assert 0 < len(dataset.coco.imgToAnns) < len(dataset.image_ids)
    dataset, _ = drawn(0, **CASES["images in no order"])
    assert dataset.image_ids != sorted(dataset.image_ids)
    dataset, batch = drawn(0)
    assert 0.1 < feed(evaluator_of(dataset, "pycocotools"), batch).summarize()["AP"] < 0.9


@each
def test_an_image_id_that_no_float_holds_is_still_found(implementation):
    dataset, batch = drawn(0, images=2)
    reference = feed(evaluator_of(dataset, "pycocotools"), batch).evaluated()
    moved = dict(zip(dataset.image_ids, (2**53, 2**53 + 1)))
    for entry in dataset.coco.dataset["annotations"]:
        entry["image_id"] = moved[entry["image_id"]]
    for entry in dataset.coco.dataset["images"]:
        entry["id"] = moved[entry["id"]]
    dataset.image_ids, dataset.coco = list(moved.values()), silent_coco(dataset.coco.dataset)
    batch = [(found, target_of(moved[target.image_id])) for found, target in batch]
    assert_same(feed(evaluator_of(dataset, implementation), batch).evaluated(), reference)


@each
def test_a_second_evaluation_starts_anew_with_the_same_ground_truth(implementation):
    dataset, batch = drawn(0)
    evaluator = feed(evaluator_of(dataset, implementation), batch)
    first = evaluator.evaluated()
    evaluator.reset()
    assert evaluator.summarize()["AP"] == 0 and evaluator.summarize()["images"] == 0
    evaluator.reset()
    assert_same(feed(evaluator, batch).evaluated(), first)


@each
def test_detections_that_come_after_an_evaluation_count_in_the_next(implementation):
    dataset, batch = drawn(0)
    evaluator = feed(evaluator_of(dataset, implementation), batch[:5])
    assert evaluator.summarize()["images"] == 5
    whole = feed(evaluator_of(dataset, implementation), batch)
    assert_same(feed(evaluator, batch[5:]).evaluated(), whole.evaluated())


@each
def test_the_last_detections_of_an_image_replace_those_before(implementation):
    dataset, batch = drawn(0)
    emptied = [(Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)), batch[0][1])]
    evaluator = feed(evaluator_of(dataset, implementation), emptied + batch)
    assert_same(evaluator.evaluated(), feed(evaluator_of(dataset, implementation), batch).evaluated())


@each
def test_processes_that_share_the_images_agree_with_one_that_sees_all(implementation, monkeypatch):
    dataset, batch = drawn(0, crowd=0.2)
    shares = batch[:7], batch[5:]  # two images came twice
    monkeypatch.setattr("util.dist.is_distributed", lambda: True)
    monkeypatch.setattr("util.dist.rank", lambda: 0)
    parts = [feed(evaluator_of(dataset, implementation), share) for share in shares]
    packed = []
    for part in parts:
        monkeypatch.setattr("util.dist.gather_objects", lambda mine: packed.append(mine) or [mine])
        part.synchronize()
    monkeypatch.setattr("util.dist.gather_objects", lambda mine: packed)
    alone = feed(evaluator_of(dataset, implementation), batch)
    for rank, part in enumerate(parts):
        assert part.summarize()["images"] < len(batch)
        monkeypatch.setattr("util.dist.rank", lambda rank=rank: rank)
        part.synchronize()
        assert part.summarize()["images"] == len(batch)
        assert part.results() == alone.results()
        assert_same(part.evaluated(), alone.evaluated())


@each
def test_what_is_gathered_are_few_arrays_not_an_object_per_detection(implementation, monkeypatch):
    dataset, batch = drawn(0)
    seen = []
    monkeypatch.setattr("util.dist.is_distributed", lambda: True)
    monkeypatch.setattr("util.dist.rank", lambda: 0)
    monkeypatch.setattr("util.dist.gather_objects", lambda mine: seen.append(mine) or [mine])
    feed(evaluator_of(dataset, implementation), batch).synchronize()
    ((image_ids, counts, rows),) = seen
    assert rows.dtype == np.float64 and rows.shape == (sum(counts), 6)
    assert sorted(image_ids) == dataset.image_ids


def test_hotcoco_has_matched_every_image_before_the_last_call():
    if "hotcoco" not in packages():
        pytest.skip("hotcoco is not installed")
    dataset, batch = drawn(0)
    evaluator = feed(evaluator_of(dataset, "hotcoco"), batch)
    late = []
    evaluator.backend.add = lambda results: late.append(dict(results))
    evaluator.synchronize()
    evaluator.evaluated()
    assert late == [{}]


@each
def test_numbers_that_are_not_finite_are_no_detections(implementation):
    dataset, batch = drawn(0, images=3)
    spoilt = []
    for found, target in batch:
        boxes = torch.cat([found.boxes_px, torch.tensor([[0, 0, torch.inf, 5], [0, 0, 5, 5]])])
        scores = torch.cat([found.scores, torch.tensor([0.9, torch.nan])])
        labels = torch.cat([found.labels, torch.zeros(2, dtype=torch.int64)])
        spoilt.append((Detections(scores, labels, boxes), target))
    reference = feed(evaluator_of(dataset, implementation), batch)
    ours = feed(evaluator_of(dataset, implementation), spoilt)
    assert ours.results() == reference.results()
    assert_same(ours.evaluated(), reference.evaluated())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_labels_survive_the_copy_with_boxes_of_any_type(dtype):
    dataset, _ = drawn(0, images=1)
    dataset.category_ids = [3, *[-1] * 998, 11]  # bfloat16 would round the label 999 to 1000
    found = Detections(torch.tensor([0.5], dtype=dtype), torch.tensor([999]), torch.tensor([[1, 2, 3, 5]], dtype=dtype))
    evaluator = feed(evaluator_of(dataset, "pycocotools"), [(found, target_of(dataset.image_ids[0]))])
    assert evaluator.results() == [
        {"image_id": dataset.image_ids[0], "category_id": 11, "bbox": [1, 2, 2, 3], "score": 0.5}
    ]


def test_an_image_of_another_data_set_is_refused():
    dataset, batch = drawn(0)
    with pytest.raises(ValueError, match=r"image ids \[-5\].*only images of the data set"):
        evaluator_of(dataset, "pycocotools").update([batch[0][0]], [target_of(-5)])


# ---- which package ----


def without(monkeypatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # what makes `import` fail


def test_auto_is_the_fastest_that_is_installed_and_pycocotools_always_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", SimpleNamespace(StreamingEval=1, Params=1))
    monkeypatch.setitem(sys.modules, "faster_coco_eval", SimpleNamespace(COCO=1, COCOeval_faster=1))
    assert find_backend("auto") is BACKENDS["hotcoco"]
    without(monkeypatch, "hotcoco")
    assert find_backend("auto") is BACKENDS["faster-coco-eval"]
    without(monkeypatch, "hotcoco", "faster_coco_eval")
    assert find_backend("auto") is BACKENDS["pycocotools"]


def test_a_hotcoco_without_streaming_is_too_old(monkeypatch):
    monkeypatch.setitem(sys.modules, "hotcoco", SimpleNamespace(Params=1))
    assert find_backend("auto") is not BACKENDS["hotcoco"]
    with pytest.raises(UserError, match=r"hotcoco>=1\.3"):
        find_backend("hotcoco")


@pytest.mark.parametrize(("name", "module"), [("hotcoco", "hotcoco"), ("faster-coco-eval", "faster_coco_eval")])
def test_a_missing_package_is_told_with_the_way_to_get_it_before_training(monkeypatch, name, module):
    without(monkeypatch, module)
    with pytest.raises(UserError, match=f'--evaluator {name}: run `pip install "{name}>=.*use --evaluator pycocotools'):
        Evaluation(None, None, None, None, None, None, evaluator=name)


def test_an_unknown_package_names_the_known_ones():
    with pytest.raises(ValueError, match="use auto, hotcoco, faster-coco-eval, pycocotools"):
        find_backend("cold")


def test_the_flag_offers_exactly_the_packages_that_there_are():
    flag = next(a for a in get_args_parser()._actions if a.dest == "evaluator")
    assert set(flag.choices) == {"auto", *BACKENDS} and flag.default == "auto"


def test_ground_truth_is_converted_once_for_all_evaluations_of_a_run(monkeypatch):
    dataset, batch = drawn(0, images=2)
    made = []
    monkeypatch.setattr(
        "util.evaluation.CocoEvaluator", lambda *a, **k: made.append(CocoEvaluator(*a, **k)) or made[-1]
    )

    def instead_of_a_model(*args, **more):
        return feed(args[4], batch).summarize(), []

    monkeypatch.setattr("util.evaluation.evaluate", instead_of_a_model)
    evaluation = Evaluation(SimpleNamespace(dataset=dataset), None, None, None, torch.device("cpu"), None, draw=0)
    model = torch.nn.Linear(1, 1)
    first, second = evaluation.run(model, None, 0), evaluation.run(model, None, 1)
    assert first == second and first["test_images"] == 2
    assert len(made) == 1
