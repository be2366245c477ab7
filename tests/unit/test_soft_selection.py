"""Competition for queries and the choice of pairs, on matrices small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from models.assign import scg

HAND = torch.tensor([[[0.50, 0.40, 0.06, 0.04], [0.30, 0.62, 0.05, 0.03], [0.24, 0.30, 0.24, 0.22]]])


def all_valid(c: torch.Tensor) -> torch.Tensor:
    return torch.ones(c.shape[:2], dtype=torch.bool)


def softmaxed(targets: int, slots: int, seed: int = 0, groups: int = 3) -> torch.Tensor:
    return torch.randn(groups, targets, slots, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def placed_mask(slot: torch.Tensor, placed: torch.Tensor, slots: int) -> torch.Tensor:
    shape = (*slot.shape, slots)
    return torch.zeros(shape, dtype=torch.bool).scatter(2, slot[..., None], placed[..., None])


# colpeak


def test_colpeak_by_hand() -> None:
    # Winners are columns 0, 1, 1: peaks .50 and .62, thresholds .25 and .31; the last target passes nowhere.
    kept = scg.colpeak(HAND, all_valid(HAND), 0.5)
    assert kept[0].tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]
    weights = scg.normalised(torch.where(kept, HAND, 0.0), all_valid(HAND), "row")[0]
    assert weights[0].tolist() == pytest.approx([0.50 / 0.90, 0.40 / 0.90, 0, 0])
    assert weights[1].tolist() == pytest.approx([0.30 / 0.92, 0.62 / 0.92, 0, 0])
    assert weights[2].sum() == 0


def test_colpeak_gives_a_lonely_target_exactly_one_slot() -> None:
    c = softmaxed(1, 20)
    assert (scg.colpeak(c, all_valid(c), 0.1).sum((1, 2)) == 1).all()


def test_extra_slots_of_colpeak_are_first_choices_of_other_targets() -> None:
    c = softmaxed(6, 20)
    kept = scg.colpeak(c, all_valid(c), 0.2)
    winners = torch.zeros_like(kept).scatter(2, c.argmax(2, keepdim=True), True)
    assert (kept & ~winners).any()
    assert not (kept & ~winners.any(1, keepdim=True)).any()


def test_colpeak_at_the_start_gives_every_active_slot_to_every_target() -> None:
    c = torch.full((1, 4, 10), 0.1)
    assert scg.colpeak(c, all_valid(c), 0.5).sum((0, 1)).tolist() == [4, *[0] * 9]


# rowpeak


def test_rowpeak_keeps_the_own_slots_of_a_target_near_its_strongest() -> None:
    c = torch.tensor([[[0.40, 0.30, 0.10, 0.20], [0.30, 0.20, 0.30, 0.20]]])
    # Columns belong to targets 0, 0, 1, 0 (a tie: the first): .40 x .6 = .24 keeps the first two of target 0.
    kept = scg.rowpeak(c, all_valid(c), 0.6)[0]
    assert kept.tolist() == [[True, True, False, False], [False, False, True, False]]


def test_rowpeak_never_shares_a_slot_not_even_where_rows_are_equal() -> None:
    for c in (softmaxed(8, 20), torch.full((2, 5, 7), 1 / 7)):
        assert (scg.rowpeak(c, all_valid(c), 0.3).sum(1) <= 1).all()


# rounds


def test_rounds_give_the_loser_of_a_bid_its_second_choice() -> None:
    scores = torch.tensor([[[5.0, 4.0, 0.0], [6.0, 1.0, 0.0], [5.5, 4.5, 2.0]]])
    # Round 1: all bid for slot 0, target 1 wins. Round 2: slot 1 goes to target 2. Round 3: target 0 gets slot 2.
    slot, placed, taken = scg.greedy_rounds(scores, all_valid(scores), 3)
    assert slot.tolist() == [[2, 0, 1]] and placed.all() and taken.all()
    slot, placed, taken = scg.greedy_rounds(scores, all_valid(scores), 2)
    assert placed.tolist() == [[False, True, True]] and taken.tolist() == [[True, True, False]]


def test_one_round_is_the_mutual_choice() -> None:
    slot, placed, _ = scg.greedy_rounds(HAND, all_valid(HAND), 1)
    assert placed.tolist() == [[True, True, False]] and slot[0, :2].tolist() == [0, 1]


@pytest.mark.parametrize(("targets", "slots"), [(1, 9), (9, 9), (5, 12), (12, 5)])
def test_as_many_rounds_as_targets_place_all_for_whom_there_is_a_slot(targets: int, slots: int) -> None:
    scores = softmaxed(targets, slots).log()
    slot, placed, _ = scg.greedy_rounds(scores, all_valid(scores), targets)
    assert placed.sum(1).tolist() == [min(targets, slots)] * 3
    assert (placed_mask(slot, placed, slots).sum(1) <= 1).all()


def test_rounds_place_one_target_each_where_all_rows_are_equal() -> None:
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5]).expand(1, 4, 4)
    for rounds in (1, 2, 4):
        slot, placed, _ = scg.greedy_rounds(scores, all_valid(scores), rounds)
        assert placed[0].tolist() == [i < rounds for i in range(4)]  # the first target wins a tie
        assert slot[0, :rounds].tolist() == [1, 3, 0, 2][:rounds]


def test_taken_and_forbidden_slots_and_padded_targets_stay_out() -> None:
    scores = torch.tensor([[[9.0, 1.0, 2.0, scg.NEG], [9.0, 8.0, 7.0, scg.NEG]]])
    valid, taken = torch.tensor([[True, False]]), torch.tensor([[True, False, False, False]])
    slot, placed, taken = scg.greedy_rounds(scores, valid, 2, taken)
    assert placed.tolist() == [[True, False]] and slot[0, 0] == 2
    assert taken.tolist() == [[True, False, True, False]]


def test_the_strongest_of_the_kept_pairs_are_at_most_so_many() -> None:
    kept = torch.tensor([[[True, True, False, True], [False, False, False, True], [False] * 4]])
    found = scg.strongest(kept, HAND, 2)
    assert found.tolist() == [[[True, True, False, False], [False, False, False, True], [False] * 4]]


# normalisation and competition


def test_weights_are_normalised_by_row_by_column_or_as_a_whole() -> None:
    weights, valid = torch.tensor([[[1.0, 3.0], [1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[True, True, False]])
    assert scg.normalised(weights, valid, "row")[0].tolist() == [[0.25, 0.75], [1.0, 0.0], [0.0, 0.0]]
    assert scg.normalised(weights, valid, "column")[0].tolist() == [[0.5, 1.0], [0.5, 0.0], [0.0, 0.0]]
    assert scg.normalised(weights, valid, "global").sum() == pytest.approx(2.0)
    assert scg.normalised(weights, valid, "none") is weights


def test_dual_competition_is_the_product_of_both_softmaxes_with_a_dustbin() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.5, 2.0], [7.0, 7.0]]])
    valid = torch.tensor([[True, True, False]])
    both = logits[0, :2].softmax(1) * logits[0, :2].exp() / (1 + logits[0, :2].exp().sum(0))
    expected = both / both.sum(1, keepdim=True)
    torch.testing.assert_close(scg.compete(logits, valid, "dual").exp()[0, :2], expected)


@pytest.mark.parametrize(("how", "share"), [("dual", 1.0), ("center", 0.5), ("sinkhorn", 0.5)])
def test_competition_weakens_what_all_targets_want(how: str, share: float) -> None:
    own = torch.eye(3)[None]
    common = torch.tensor([5.0, 0.0, 0.0])
    valid = torch.ones(1, 3, dtype=torch.bool)
    plain, competed = (scg.compete(own + common, valid, h).exp()[0] for h in ("none", how))
    assert plain.argmax(1).tolist() == [0, 0, 0]
    assert competed[1:, 0].sum() < share * plain[1:, 0].sum()


def test_centring_leaves_a_lonely_target_alone() -> None:
    logits, valid = torch.randn(1, 3, 5), torch.tensor([[True, False, False]])
    plain, centred = (scg.compete(logits, valid, how)[0, 0] for how in ("none", "center"))
    assert torch.equal(plain, centred)


def test_sinkhorn_gives_a_slot_to_about_one_target() -> None:
    logits = torch.zeros(1, 4, 12)
    logits[..., 0] = 6.0
    c = scg.compete(logits, all_valid(logits), "sinkhorn").exp()
    assert c[0, :, 0].sum() < 1.3 < scg.compete(logits, all_valid(logits), "none").exp()[0, :, 0].sum()


@pytest.mark.parametrize("how", ["none", "dual", "center", "sinkhorn"])
def test_padded_rows_take_no_part_in_the_competition(how: str) -> None:
    logits = torch.randn(2, 3, 7)
    more = torch.cat([logits, torch.full((2, 5, 7), 3.0)], 1)
    valid = torch.arange(8).expand(2, -1) < 3
    ours, padded = scg.compete(logits, all_valid(logits), how), scg.compete(more, valid, how)[:, :3]
    torch.testing.assert_close(ours, padded, atol=1e-6, rtol=1e-5)
