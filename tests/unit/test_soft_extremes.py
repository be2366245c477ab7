"""The learned matcher where numbers become extreme: saturated logits, the bound of the scale, many queries."""

from __future__ import annotations

import pytest
import torch

from models.assign import scg
from models.assign.health import against_optimum
from models.assign.probe import Probe
from tests.unit.soft_cases import (
    found_by,
    random_predictions,
    random_target,
    request_of,
    soft_criterion,
    soft_matcher,
)
from util.structures import FlatTargets


@pytest.mark.parametrize("bound", [10.0, 30.0])
def test_a_scale_at_its_bound_can_come_back(bound: float) -> None:
    probe = Probe(8, 3, scale_max=bound)
    with torch.no_grad():
        probe.log_scale.fill_(10.0)  # far above
    logits = probe(torch.randn(1, 5, 8), torch.rand(1, 5, 4), torch.tensor([[0, 1]]), torch.rand(1, 2, 4))
    assert logits.abs().max() <= bound * (1 + 1e-5)
    before = probe.log_scale.item()
    logits.square().sum().backward()
    torch.optim.SGD([probe.log_scale], lr=1e-4).step()
    assert probe.log_scale < before


@pytest.mark.parametrize("gap", [1.0, 30.0, 200.0])
def test_a_pair_counts_in_full_however_small_its_correspondence_is(gap: float) -> None:
    """Both targets want slot 0; the second gets slot 1, whose correspondence may be no number above 0 any more."""
    logits = torch.tensor([[[2 * gap, gap, 0.0], [2 * gap - 1, gap - 1, 0.0]]])
    log_c, valid = logits.log_softmax(-1), torch.ones(1, 2, dtype=torch.bool)
    slot, placed, _ = scg.greedy_rounds(log_c, valid, 2)
    assert slot.tolist() == [[0, 1]] and placed.all()
    kept = torch.zeros(1, 2, 3, dtype=torch.bool).scatter(2, slot[..., None], True)
    assert scg.row_weights(log_c, kept).tolist() == [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]


def test_weights_of_a_target_without_a_pair_are_zero_and_so_are_their_gradients() -> None:
    logits = torch.randn(1, 2, 4, requires_grad=True)
    kept = torch.tensor([[[True, True, False, False], [False] * 4]])
    weights = scg.row_weights(logits.log_softmax(-1), kept)
    torch.testing.assert_close(weights.sum(-1), torch.tensor([[1.0, 0.0]]))
    (weights * torch.randn(4)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 0, :2].abs().sum() > 0
    assert logits.grad[0, 1].abs().sum() == 0


def test_weights_from_logarithms_are_those_from_correspondences() -> None:
    log_c = torch.randn(2, 3, 6).log_softmax(-1)
    kept = torch.rand(2, 3, 6) > 0.4
    expected = scg.normalised(torch.where(kept, log_c.exp(), 0.0), torch.ones(2, 3, dtype=torch.bool), "row")
    torch.testing.assert_close(scg.row_weights(log_c, kept), expected, atol=1e-6, rtol=1e-5)


def test_a_target_without_a_slot_lowers_the_agreement_and_not_the_regret() -> None:
    costs = torch.tensor([[[1.0, 5.0, 9.0], [4.0, 2.0, 9.0]]])
    weights = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])  # the first pays 5, not 1; the second has nothing
    found = against_optimum(weights, costs, FlatTargets.of([random_target(2)]))
    assert (found["agree"], found["regret"]) == (0.0, 4.0)
    nothing = against_optimum(weights * 0, costs, FlatTargets.of([random_target(2)]))
    assert nothing["agree"] == 0 and "regret" not in nothing


def test_regret_is_the_mean_cost_of_pairs_whatever_their_weights_add_up_to() -> None:
    costs = torch.tensor([[[1.0, 5.0, 9.0]]])
    for scale in (0.1, 1.0, 3.0):
        weights = scale * torch.tensor([[[0.5, 0.5, 0.0]]])
        found = against_optimum(weights, costs, FlatTargets.of([random_target(1)]))
        torch.testing.assert_close(found["regret"], torch.tensor(2.0))


def test_the_literal_form_is_compared_with_the_same_optimum_as_the_others() -> None:
    request = request_of(random_predictions(slots=30), [random_target(5), random_target(3)])
    literal, soft = (soft_matcher(matcher=name).eval() for name in ("soft-literal", "soft"))
    costs = [matcher.matching_costs(found_by(matcher, request)) for matcher in (literal, soft)]
    torch.testing.assert_close(*costs)
    assert not torch.allclose(found_by(literal, request).costs.total, costs[0])


@pytest.mark.parametrize("flags", ["", "--scg rounds"])
def test_all_queries_of_an_object_in_the_one_to_many_branch_learn_its_class(flags: str) -> None:
    predictions, targets = random_predictions(slots=30), [random_target(4), random_target(2)]
    matcher = soft_matcher(f"{flags} --scg_rho 0.01 --soft_extra_layers 0")
    (pairs,) = matcher([request_of(predictions, targets, repeat=3)])
    taught = pairs.weight > 0
    assert pairs.score[taught].max() == 1 and (pairs.score[taught] > 0).all()
    if flags:
        assert (pairs.score[taught] == 1).all()
    sums = torch.zeros(2, 2, 4).index_put((pairs.layer, pairs.image, pairs.target), pairs.weight, accumulate=True)
    torch.testing.assert_close(sums, torch.tensor([[3.0] * 4, [3.0, 3.0, 0.0, 0.0]]).expand(2, -1, -1))


def test_a_single_query_has_no_entropy_and_no_nan() -> None:
    criterion = soft_criterion("--probe_entropy 0.1 --epochs 10")
    request = request_of(random_predictions(slots=1), [random_target(1)] * 2, time=0.0)
    (pairs,) = criterion.assigners["queries"]([request])
    assert pairs.losses["loss_corr"].isfinite().all()
