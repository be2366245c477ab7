"""Options of the learned matcher that change more than a number: a probe per layer, consistent layers, mean values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.assign import LayerwiseProbe, Probe
from models.assign.costs import class_cost
from models.assign.dense import PairCosts, Slots
from tests.tiny import TWO_STAGE, make_target
from tests.unit.soft_cases import (
    CLASSES,
    WIDTH,
    dense,
    found_by,
    output_of,
    random_predictions,
    random_target,
    request_of,
    soft_criterion,
    soft_matcher,
)
from util.checkpoint import load_criterion
from util.errors import UserError
from util.structures import Predictions

TARGETS = [random_target(5, seed=0), random_target(2, seed=1)]

# a probe for each layer


@pytest.mark.parametrize(
    ("flags", "role", "names"),
    [
        ("--matcher soft", "queries", {"0", "1"}),
        ("--matcher soft --no_aux_loss", "queries", {"1"}),
        (f"--matcher soft-literal {TWO_STAGE} --enc_matcher soft", "queries", {"0", "1", "encoder"}),
        (f"--matcher soft {TWO_STAGE} --enc_matcher cost-greedy", "queries", {"0", "1"}),
        (f"{TWO_STAGE} --matcher hungarian --enc_matcher soft", "proposals", {"encoder"}),
    ],
)
def test_every_supervised_layer_and_softly_matched_proposals_have_a_probe(flags: str, role: str, names: set) -> None:
    criterion = soft_criterion(f"{flags} --probe_per_layer", "hungarian")
    assert criterion.assigners[role].probe.probes.keys() == names


def layerwise(*, alike: bool) -> tuple[LayerwiseProbe, Probe]:
    """Return probes of layers 0, 1, 2 and the encoder, and one that they are copies of."""
    torch.manual_seed(0)
    one = Probe(WIDTH, CLASSES)
    several = LayerwiseProbe(lambda: Probe(WIDTH, CLASSES), range(3), proposals=True)
    if alike:
        for probe in several.probes.values():
            probe.load_state_dict(one.state_dict())
    return several, one


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [1]], ids=str)
def test_equal_probes_say_what_one_of_them_says_for_all_layers(layers: list[int]) -> None:
    predictions, (several, one) = random_predictions(layers=3), layerwise(alike=True)
    matcher = soft_matcher("--column_competition none")
    request = replace(request_of(predictions, TARGETS), rows=layers, layers=layers)
    matcher.probe = one
    expected = found_by(matcher, request)
    matcher.probe = several
    torch.testing.assert_close(found_by(matcher, request).log_c, expected.log_c)


def test_a_layer_asks_its_own_probe_by_its_number_in_the_decoder() -> None:
    predictions, (several, _) = random_predictions(layers=2), layerwise(alike=False)
    matcher = soft_matcher()
    matcher.probe = several
    request = replace(request_of(predictions, TARGETS), layers=[0, 2])  # rows 0 and 1 of what was kept of a decoder
    before = found_by(matcher, request).c.unflatten(0, (2, 2))
    with torch.no_grad():
        several.probes["1"].query_in.weight.mul_(-2)
        several.probes["encoder"].query_in.weight.mul_(-2)
    assert torch.equal(found_by(matcher, request).c.unflatten(0, (2, 2)), before)
    with torch.no_grad():
        several.probes["2"].query_in.weight.mul_(-2)
    after = found_by(matcher, request).c.unflatten(0, (2, 2))
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_probes_that_are_not_asked_get_a_gradient_of_0() -> None:
    several, _ = layerwise(alike=False)
    generator = torch.Generator().manual_seed(0)
    slots = torch.rand(2, 6, WIDTH + 4, generator=generator)
    labels, boxes = torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2, 4, generator=generator)
    for agnostic, asked in ((False, 1), (True, "encoder"), (False, "encoder")):
        several.zero_grad()
        logits = several(slots[..., 4:], slots[..., :4], labels, boxes, class_agnostic=agnostic, layers=[asked])
        (logits * torch.rand(logits.shape, generator=generator)).sum().backward()
        sizes = {name: sum(p.grad.abs().sum() for p in probe.parameters()) for name, probe in several.probes.items()}
        assert {name for name, size in sizes.items() if size > 0} == {str(asked)}


def test_probes_per_layer_are_restored_and_one_for_all_is_refused_in_their_place() -> None:
    first, second = (soft_criterion("--probe_per_layer") for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    assert load_criterion(second, {"criterion": first.state_dict()}, "x.pth")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    with pytest.raises(UserError, match=r"x\.pth was trained with another matcher.*--probe_per_layer"):
        load_criterion(second, {"criterion": soft_criterion().state_dict()}, "x.pth")
    last = soft_criterion("--probe_per_layer --no_aux_loss")  # it has no probes of early layers
    with pytest.raises(UserError, match=r"with the latter its --no_aux_loss"):
        load_criterion(last, {"criterion": first.state_dict()}, "x.pth")


# consistent layers


@pytest.mark.parametrize("flags", ["", "--scg rounds", "--scg rowpeak", "--cls_target hard"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_the_last_layer_teaches_all_layers_and_each_layer_its_own_correspondence(flags: str, repeat: int) -> None:
    predictions = random_predictions(layers=3)
    own, consistent = soft_matcher(flags), soft_matcher(f"{flags} --layer_consistency last")
    request = request_of(predictions, TARGETS, repeat=repeat)
    plain, found = found_by(own, request), found_by(consistent, request)
    for name in ("kept", "weights"):
        expected, values = (getattr(x, name).unflatten(0, (3, 2)) for x in (plain, found))
        assert all(torch.equal(layer, expected[-1]) for layer in values)
        assert not torch.equal(expected[0], expected[-1])
    (ours,), (theirs,) = consistent([request]), own([request])
    assert torch.equal(dense(ours, predictions, 8), found.weights.unflatten(0, (3, 2)))
    assert torch.equal(ours.losses["loss_corr"], theirs.losses["loss_corr"])


def test_the_last_layer_of_a_set_is_the_last_one_that_its_supervision_teaches() -> None:
    predictions, matcher = random_predictions(layers=3), soft_matcher("--layer_consistency last")
    early = replace(request_of(predictions, TARGETS), rows=[0, 1], layers=[0, 1])
    expected = found_by(soft_matcher(), early).weights.unflatten(0, (2, 2))[1]
    assert all(torch.equal(layer, expected) for layer in found_by(matcher, early).weights.unflatten(0, (2, 2)))


# the mean prediction in place of the mean cost


@pytest.mark.parametrize("flags", ["", "--corr_class full", "--corr_grad full"])
def test_mean_prediction_and_mean_cost_are_the_same_where_the_probe_is_decided(flags: str) -> None:
    found = soft_matcher(flags).correspond(request_of(random_predictions(), TARGETS))
    slots = torch.randint(12, found.valid.shape, generator=torch.Generator().manual_seed(0))
    found.c = torch.eye(12)[slots] * found.valid[..., None]
    cost, prediction = (
        soft_matcher(f"{flags} --probe_value {value}")._losses(found)["loss_corr"] for value in ("cost", "prediction")
    )
    torch.testing.assert_close(prediction, cost, atol=1e-4, rtol=1e-5)


def test_a_mean_prediction_by_hand() -> None:
    # Half of a box to the left and half of one to the right is the object; logits 0 and log 3: p is .5 and .75.
    boxes = torch.tensor([[[[0.3, 0.5, 0.2, 0.2], [0.7, 0.5, 0.2, 0.2]]]])
    logits = torch.tensor([[[[0.0, -9.0], [3.0, -9.0]]]])
    logits[0, 0, 1, 0] = torch.tensor(3.0).log()
    request = request_of(Predictions(logits, boxes), [make_target([[0.5, 0.5, 0.2, 0.2]], [0])])
    slots, target = Slots.of(request), request.targets
    c = torch.tensor([[[0.5, 0.5]]])
    own_class = 2 * class_cost(torch.tensor(0.625).logit())
    args = (c, slots, target.labels[None], target.boxes[None])
    assert PairCosts().of_mean(*args).item() == pytest.approx(own_class.item(), abs=1e-5)
    loud = PairCosts(cost_class=0, cost_bbox=5, cost_giou=0).of_mean(c * torch.tensor([2.0, 0.0]), *args[1:])
    assert loud.item() == pytest.approx(5 * 0.2)  # all weight on the left one, 0.2 away


def test_mean_predictions_teach_a_probe_in_the_criterion() -> None:
    criterion, predictions = soft_criterion("--probe_value prediction"), random_predictions(grad=True)
    report = criterion(output_of(predictions), TARGETS, 0.0)
    plain = soft_criterion()(output_of(predictions), TARGETS, 0.0)
    assert report.terms["loss_corr"] < plain.terms["loss_corr"]  # blends of boxes are rewarded
    assert {k for k in report.terms if report.terms[k] != plain.terms[k]} == {"loss_corr", "loss_corr_0"}
