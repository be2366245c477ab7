"""Measures of an evaluation that all matchers have, those of small objects, and where they are written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from models.assign import HungarianMatcher
from models.assign.health import against_optimum, chosen_slots
from tests.cli import run
from tests.tiny import make_target
from tests.unit.soft_cases import CLASSES, output_of, random_predictions, random_target, request_of, soft_criterion
from util.flips import Flips
from util.logger import Meters
from util.structures import Assignment, FlatTargets, Predictions, SupervisedSet, Supervision, Target

# small objects


def sized(areas: list[float], *, size: tuple[int, int] = (0, 0), area: bool = True) -> Target:
    """Return objects of square boxes of `areas` in a file of 100 x 200 pixels; `area` says so twice."""
    boxes = [[0.5, 0.5, a**0.5 / 200, a**0.5 / 100] for a in areas]
    target = replace(make_target(boxes, [0] * len(areas)), orig_size=(100, 200), size=size)
    return replace(target, area=torch.tensor(areas)) if area else target


def test_the_area_of_an_object_counts_in_pixels_of_the_file() -> None:
    assert sized([400.0, 2500.0], area=False).file_area().tolist() == pytest.approx([400, 2500])
    # The annotated area, which is that of the mask, after an image has been made twice as large each way.
    enlarged = replace(sized([400.0, 2500.0], size=(200, 400)), area=torch.tensor([1000.0, 4000.0]))
    assert enlarged.file_area().tolist() == [250, 1000]
    flat = FlatTargets.of([enlarged, make_target(), sized([9.0], area=False)])
    assert flat.file_area().tolist() == pytest.approx([250, 1000, 9])


# Optimal: the diagonal, cost 1 each. Chosen: slots 0, 2 and half of each of 2 and 1.
COSTS = torch.tensor([[[1.0, 5.0, 9.0], [4.0, 1.0, 6.0], [9.0, 3.0, 1.0]]])
WEIGHTS = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.4, 0.6]]])


def compared(areas: list[float]) -> dict[str, float]:
    found = against_optimum(WEIGHTS, COSTS, FlatTargets.of([sized(areas)]))
    return {name: value.item() for name, value in found.items()}


def test_agreement_and_regret_of_small_objects_by_hand() -> None:
    everything = {"agree": 2 / 3, "regret": (0 + 5 + (0.4 * 3 + 0.6 - 1)) / 3}
    assert compared([2000.0, 1024.0, 1024.5]) == pytest.approx({**everything, "agree_small": 0, "regret_small": 5})
    small = {"agree_small": 1 / 2, "regret_small": (5 + 0.8) / 2}
    assert compared([2000.0, 100.0, 200.0]) == pytest.approx({**everything, **small})
    assert compared([2000.0, 3000.0, 4000.0]) == pytest.approx(everything)


def test_batches_without_small_objects_or_any_object_do_not_spoil_averages() -> None:
    criterion, meters = soft_criterion(matcher="cost-greedy").eval(), Meters()
    small, large = ([replace(random_target(4), orig_size=size)] for size in ((40, 40), (4000, 4000)))
    predictions, agree = random_predictions(images=1), []
    for targets in (small, large, [make_target()]):
        report = criterion(output_of(predictions), targets)
        meters.update_losses(report)
        agree += [report.terms["agree"].item()] if "agree" in report.terms else []
    averages = meters.averages()
    assert averages["agree_small_unscaled"] == pytest.approx(agree[0]) and agree[0] > 0
    assert averages["agree_unscaled"] == pytest.approx(sum(agree) / 2) and len(agree) == 2


# queries of objects


def test_the_query_of_an_object_is_that_of_its_strongest_pair_on_the_layer() -> None:
    targets = FlatTargets.of([random_target(2), make_target(), random_target(3)])
    layer, image, target, slot, weight = torch.tensor(
        [
            [1, 0, 0, 4, 0.3],
            [1, 0, 0, 2, 0.7],
            [0, 0, 0, 9, 1.0],
            [1, 2, 1, 5, 0.2],
            [1, 2, 2, 5, 0.0],
        ]
    ).T
    pairs = Assignment(layer.long(), image.long(), slot.long(), target.long(), weight=weight)
    assert chosen_slots(pairs, 1, targets).tolist() == [2, -1, -1, 5, -1]
    assert chosen_slots(pairs, 0, targets).tolist() == [9, -1, -1, -1, -1]
    assert chosen_slots(replace(pairs, weight=None), 0, targets).tolist() == [9, -1, -1, -1, -1]


@pytest.mark.parametrize("matcher", ["hungarian", "cost-greedy", "soft", "soft-literal"])
def test_the_report_of_an_evaluation_names_the_queries_of_its_set(matcher: str) -> None:
    stack, targets = random_predictions(slots=20), [random_target(5), random_target(2)]
    part = Predictions(stack.logits[:, :, 8:], stack.boxes[:, :, 8:], embeds=[x[:, 8:] for x in stack.embeds])
    output = output_of(part)
    output.sets["one2one"] = SupervisedSet(part, (Supervision(),), stack, 8)
    criterion = soft_criterion(matcher=matcher)
    assert criterion(output, targets).chosen is None  # in training nobody asks
    chosen = criterion.eval()(output, targets).chosen
    (pairs,) = criterion.assigners["queries"]([request_of(part, targets)])
    assert torch.equal(chosen, chosen_slots(pairs, 1, FlatTargets.of(targets)))
    assert (chosen < 12).all() and (matcher.startswith("soft") or (chosen >= 0).all())


def test_hungarian_matching_counts_duplicates_too_but_only_in_evaluation() -> None:
    same = [0.5, 0.5, 0.2, 0.2]
    logits = torch.full((1, 1, 4, CLASSES), 2.0)
    predictions = replace(random_predictions(1, 1, 4), logits=logits, boxes=torch.tensor([[[same] * 4]]))
    target, terms = make_target([same, [0.1, 0.1, 0.1, 0.1]], [1, 1]), {}
    for matcher in ("hungarian", "soft"):
        criterion = soft_criterion(matcher=matcher)
        assert ("dup" in criterion(output_of(predictions), [target]).terms) == (matcher == "soft")
        terms[matcher] = criterion.eval()(output_of(predictions), [target]).terms
    assert terms["hungarian"]["dup"] == terms["soft"]["dup"] == 3 / 2
    assert isinstance(soft_criterion(matcher="hungarian").assigners["queries"], HungarianMatcher)


def test_flips_are_changes_against_the_evaluation_before() -> None:
    flips, targets = Flips(images=3), [replace(random_target(n), image_id=i) for i, n in enumerate((2, 0, 2, 1))]

    def evaluated(*slots: int) -> dict[str, float]:
        chosen = torch.tensor(slots)
        for part, own in ((targets[:2], chosen[:2]), (targets[2:3], chosen[2:4]), (targets[3:], chosen[4:])):
            flips.see(part, own)
        return flips.finish()

    assert evaluated(3, 4, 5, -1, 7) == {}
    assert evaluated(3, 4, 5, -1, 8) == {"flip": 0}  # the fourth image is not among the first three
    assert evaluated(4, 4, 5, 6, 8) == {"flip": 2 / 4}
    assert evaluated(4, 4, -1, 6, 8) == {"flip": 1 / 4}
    assert Flips().finish() == {}


# log.txt and TensorBoard

EVERY = {"test_dup_unscaled", "test_loss_ce"}
LEARNED = {f"{part}_{n}_unscaled" for part in ("train", "test") for n in ("distinct", "unassigned", "c_max", "dup")}
LEARNED |= {"train_pos_per_gt_unscaled", "train_loss_corr", "test_loss_corr", "test_regret_unscaled"}
LEARNED |= {"test_agree_unscaled", "test_agree_small_unscaled", "test_regret_small_unscaled"}


@pytest.mark.parametrize("matcher", ["hungarian", "soft"])
def test_measures_are_in_log_txt_and_on_tensorboard(matcher: str, tmp_path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = f"--synthetic_train 2 --synthetic_val 2 --tensorboard --matcher {matcher}"
    assert run(tmp_path, flags) == 0
    first, second = (json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert "test_flip" not in first and 0 <= second["test_flip"] <= 1
    expected = EVERY | (LEARNED if matcher == "soft" else set())
    assert expected <= first.keys() and expected <= second.keys()
    assert not [name for name in second if "agree" in name or "regret" in name] or matcher == "soft"
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in expected | {"test_flip"}:
        assert events.Scalars(name.replace("_", "/", 1))[-1].value == pytest.approx(second[name]), name
