"""Conflict of heads: Grad-CAM, distances between maps, their averages, and the command line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import build_model
from models.assign import HungarianMatcher
from models.aux_heads.base import AuxOutput, Objects, Samples
from models.criterion import Criterion
from tests.cli import run
from tests.tiny import make_target, tiny_args, tiny_images, tiny_targets
from util.analysis import conflict
from util.analysis.base import Subject
from util.analysis.conflict import average_distances, distances, grad_cam, gradient, measure, read_result, table
from util.errors import UserError
from util.structures import Assignment, DetectorOutput, Memory, Predictions, SupervisedSet, Supervision

WIDE = "--hidden_dim 64"  # GroupNorm(32) of a 1 x 1 map in a batch of one image needs two channels in a group
BOTH = f"{WIDE} --aux_heads atss faster_rcnn --roi_samples 16"
ALONE = f"{WIDE} --aux_heads atss"


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No share of the uniform distribution."""
    monkeypatch.setattr(conflict, "EPSILON", 0.0)


def maps(*rows: list[float]) -> Tensor:
    """Return maps (K, 1, W)."""
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def test_distance_of_two_maps_of_two_pixels(exact) -> None:
    found = distances(maps([3, 1], [7, 7]))  # (3/4, 1/4) and (1/2, 1/2)
    there = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert found.flatten().tolist() == pytest.approx([0, there, back, 0])


def test_maps_that_differ_by_a_factor_have_distance_0() -> None:
    cam = torch.rand(1, 5, 7, dtype=torch.float64)
    assert distances(torch.cat([cam, 1000 * cam, cam])).abs().max() < 1e-12


def test_a_share_of_every_map_is_uniform_so_that_disjoint_maps_are_a_finite_distance_apart() -> None:
    found, share = distances(maps([5, 0], [0, 2])), conflict.EPSILON
    apart = (1 - share) * math.log((1 - share / 2) / (share / 2))
    assert found.flatten().tolist() == pytest.approx([0, apart, apart, 0])


def test_a_map_of_zeros_is_uniform() -> None:
    assert distances(maps([0, 0, 0], [4, 4, 4])).abs().max() < 1e-12


def test_average_distance_is_half_the_mean_of_both_directions_to_the_other_auxiliary_heads() -> None:
    matrix = torch.tensor([[0.0, 9, 9, 9], [9, 0, 1, 2], [9, 3, 0, 4], [9, 5, 6, 0]])
    expected = [(1 + 3 + 2 + 5) / 4, (3 + 1 + 4 + 6) / 4, (5 + 2 + 6 + 4) / 4]
    assert average_distances(matrix).tolist() == expected


def test_a_single_auxiliary_head_is_compared_with_the_detr_head() -> None:
    assert average_distances(torch.tensor([[0.0, 3], [4, 0]])).tolist() == [3.5]


# --- maps -------------------------------------------------------------------------------------------------------------


def test_grad_cam_of_a_linear_head() -> None:
    # Two channels; levels of 1 x 3 cells, of which the last is padding, and of 1 x 1 cell.
    tokens = torch.tensor([[[1.0, 2], [3, 1], [9, 9], [2, 5]]], requires_grad=True)
    padding = torch.tensor([[False, False, True, False]])
    memory = Memory(tokens, padding, ((1, 3), (1, 1)), torch.ones(1, 2, 2))
    # The gradient is these weights themselves. Without padding the channels of the first level have the means 2, -1,
    # so its CAM is 2 * 1 - 2 = 0 and 2 * 3 - 1 = 5; the second level has 1 * 2 - 1 * 5 < 0, that is 0.
    weights = torch.tensor([[[1.0, -2], [3, 0], [70, 70], [1, -1]]])
    slope = gradient((tokens * weights).sum(), memory)
    assert torch.equal(slope.tokens, weights)
    cam = grad_cam(memory, slope, 0, [(1, 2), (1, 1)], (1, 2))
    assert cam.tolist() == [[0, 2.5]]


def test_the_score_of_an_auxiliary_head_sums_the_logits_of_the_classes_of_its_positives() -> None:
    logits = torch.arange(12.0).view(1, 4, 3)
    positive = torch.tensor([[True, False, True, False]])
    samples = Samples(torch.zeros(1, 4, 4), positive, ~positive, torch.tensor([[1, 0, 0, 0]]), torch.zeros(1, 4, 2))
    objects = Objects(torch.tensor([[0, 2]]), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool), [2])
    assert conflict.score_of_samples(AuxOutput({}, samples, logits), objects) == 2 + 6


def test_the_score_of_the_detr_head_sums_the_logits_of_its_hungarian_pairs() -> None:
    near, far = [0.3, 0.3, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]
    boxes = torch.tensor([[far, near], [near, far]])
    logits = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]])
    # The first layer holds nonsense: only the last one counts.
    predictions = Predictions(torch.stack([9 + logits, logits]), torch.stack([boxes.flip(1), boxes]))
    # The supervision of the first layer is not that of the last, and early epochs may match an object twice.
    supervision = (Supervision("other", layers=range(1)), Supervision("queries", layers=range(1, 2), repeat=2))
    criterion = Criterion(assigners={"queries": HungarianMatcher()}, terms={}, weights={})
    output = DetectorOutput({"one2one": SupervisedSet(predictions, supervision)})
    targets = [make_target([near], [1]), make_target([far, near], [1, 0])]
    score = conflict.score_of_pairs(output, criterion, targets)
    assert score.item() == pytest.approx(0.4 + 0.8 + 0.5)


def test_pairs_without_weight_are_no_pairs() -> None:
    logits = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    zeros, slots = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
    pairs = Assignment(zeros, zeros, slots, zeros, weight=torch.tensor([0.0, 0.5]))
    criterion = Criterion(assigners={"queries": lambda requests: [pairs]}, terms={}, weights={})
    supervised = SupervisedSet(Predictions(logits[None], torch.zeros(1, 1, 2, 4)), (Supervision("queries"),))
    target = make_target([[0.5, 0.5, 0.1, 0.1]], [1])
    score = conflict.score_of_pairs(DetectorOutput({"one2one": supervised}), criterion, [target])
    assert score.item() == pytest.approx(0.4)


# --- a detector -------------------------------------------------------------------------------------------------------


def subject(flags: str, targets: list, *, images=None) -> Subject:
    torch.manual_seed(0)
    model, criterion, _ = build_model(tiny_args(f"{flags} --with_box_refine"))
    images = images or tiny_images([(128, 128)] * len(targets))
    return Subject(model, criterion, [(images, targets)], torch.device("cpu"), Path(), "tiny")


def test_gradients_end_at_the_memory_and_heads_make_no_queries() -> None:
    model = subject(ALONE, tiny_targets()).model.eval()
    source = conflict.auxiliary_heads(model).train()
    queries = source.queries
    with conflict.watch(model) as seen:
        output = model(tiny_images(), tiny_targets())
    assert list(output.sets) == ["one2one"] and list(seen.heads) == ["atss"] and source.queries is queries
    assert seen.memory.tokens.is_leaf and seen.memory.tokens.requires_grad
    assert gradient(output.pred_logits.sum(), seen.memory).tokens.abs().sum() > 0
    assert gradient(conflict.score_of_samples(*seen.heads["atss"]), seen.memory).tokens.abs().sum() > 0


def test_images_without_objects_are_left_out() -> None:
    targets = tiny_targets()  # the second image has none
    both, examples = measure(subject(ALONE, targets))
    alone, _ = measure(subject(ALONE, targets[:1]))
    assert (both["images"], both["images_without_objects"]) == (1, 1) and len(examples) == 1
    assert (alone["images"], alone["images_without_objects"]) == (1, 0)
    torch.testing.assert_close(torch.tensor(both["matrix"]), torch.tensor(alone["matrix"]), rtol=1e-3, atol=1e-5)
    assert min(both["matrix"][0][1], both["matrix"][1][0]) > 1e-3
    with pytest.raises(UserError, match="no validation image has an object"):
        measure(subject(ALONE, targets[1:]))


def test_the_matrix_is_the_mean_over_images() -> None:
    first, second = tiny_targets()[0], make_target([[0.4, 0.5, 0.5, 0.6]], [2])
    images = tiny_images([(128, 128), (96, 114)])
    single = [measure(subject(ALONE, t, images=images))[0] for t in ([first, make_target()], [make_target(), second])]
    both = measure(subject(ALONE, [first, second], images=images))[0]
    expected = sum(torch.tensor(one["matrix"]) for one in single) / 2
    torch.testing.assert_close(torch.tensor(both["matrix"]), expected, rtol=1e-3, atol=1e-5)


def test_heads_with_the_same_weights_have_no_conflict() -> None:
    twins = subject(f"{WIDE} --aux_heads atss atss", tiny_targets())
    different, _ = measure(twins)
    assert different["averages"]["atss"] == different["averages"]["atss2"] > 1e-3
    heads = twins.model.groups["co"].heads
    heads["atss2"].load_state_dict(heads["atss"].state_dict())
    same, _ = measure(twins)
    assert same["heads"] == ["detr", "atss", "atss2"]
    assert max(same["averages"].values()) < 1e-9 and same["matrix"][0][1] > 1e-3


def test_weights_of_a_diverged_run_are_named() -> None:
    broken = subject(ALONE, tiny_targets())
    torch.nn.init.constant_(broken.model.groups["co"].heads["atss"].cls_convs[0].conv.weight, float("nan"))
    with pytest.raises(UserError, match=r"head atss on image id 7 is not finite.* earlier checkpoint"):
        measure(broken)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(tmp_path_factory) -> Path:
    """A detector with two auxiliary heads, trained (`run`) and analysed (`two`), and one with a single head (`one`)."""
    folder, short = tmp_path_factory.mktemp("conflict"), "--epochs 1 --synthetic_train 2 --synthetic_val 4"
    for form, name in ((BOTH, "two"), (ALONE, "one")):
        assert run(folder / f"run_{name}", f"{form} {short}") == 0
        with_others = f"--analyse_with {folder / 'two' / 'conflict.json'}" * (name == "one")
        weights = f"--resume {folder / f'run_{name}' / 'checkpoint.pth'}"
        assert run(folder / name, f"{form} {short} --analyse conflict {weights} {with_others}") == 0
    return folder


def test_a_checkpoint_is_analysed_with_the_flags_of_its_training(analysed: Path) -> None:
    found = json.loads((analysed / "two" / "conflict.json").read_text())
    assert found["heads"] == ["detr", "faster_rcnn", "atss"] and found["label"] == "run_two" and found["images"] == 4
    matrix = torch.tensor(found["matrix"])
    assert matrix.shape == (3, 3) and (matrix.diagonal() == 0).all() and (matrix >= 0).all() and matrix[0, 1] > 0
    mean = (matrix[1, 2] + matrix[2, 1]).item() / 2
    assert found["averages"] == pytest.approx({"faster_rcnn": mean, "atss": mean})
    assert all((analysed / "two" / f"conflict{name}.png").stat().st_size > 1000 for name in ("", "_examples"))


def test_a_single_head_is_analysed_and_drawn_beside_other_checkpoints(analysed: Path) -> None:
    found = json.loads((analysed / "one" / "conflict.json").read_text())
    assert found["averages"]["atss"] == pytest.approx((found["matrix"][0][1] + found["matrix"][1][0]) / 2)
    assert (analysed / "one" / "conflict.png").stat().st_size > 1000


def test_the_table_has_the_matrix_and_a_line_of_averages_for_each_checkpoint(analysed: Path) -> None:
    one, two = (read_result(analysed / name / "conflict.json") for name in ("one", "two"))
    one |= {"matrix": [[0.0, 0.12345], [0.5, 0.0]], "averages": {"atss": 0.25}, "images_without_map": {"atss": 3}}
    lines = table([one, two]).splitlines()
    assert lines[1].split() == ["detr", "0.0000", "0.1235"] and lines[2].split() == ["atss", "0.5000", "0.0000"]
    assert lines[3] == "average distance, run_one: atss 0.2500" and lines[4].startswith("average distance, run_two: ")
    assert lines[5] == "atss: 3 of 4 images have a map of 0, taken as uniform"


def test_without_matplotlib_the_numbers_are_written(analysed: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = subject(ALONE, tiny_targets())
    source.folder = tmp_path
    assert conflict.analyse_conflict(source) == [tmp_path / "conflict.json"]
    assert "no pictures: curves need matplotlib" in capsys.readouterr().out


def test_flags_without_auxiliary_heads_say_what_to_give(analysed: Path, tmp_path: Path, capsys) -> None:
    weights = f"--resume {analysed / 'run_one' / 'checkpoint.pth'}"
    assert run(tmp_path, f"{WIDE} --analyse conflict {weights}") == 2
    assert "give --aux_heads as in training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not a JSON file"),
        ("[]", "not of an analysis"),
        ('{"analysis": "discriminability"}', "of the analysis discriminability"),
        ('{"analysis": "conflict", "label": "a"}', "no complete averages"),
        ('{"analysis": "conflict", "label": "a", "heads": ["detr"], "averages": {}}', "no complete averages"),
        (
            '{"analysis": "conflict", "label": "a", "heads": ["detr", "gfl"], "averages": {"gfl": 0.5}, "epsilon": 1}',
            "written with epsilon 1, not 0.001",
        ),
    ],
)
def test_a_file_that_is_no_result_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"--analyse_with: .*other\.json .*{message}"):
        read_result(path)
