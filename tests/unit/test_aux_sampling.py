"""Random samples of positives and negatives, batched: the cap on positives, filling up, fair choice."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from models.aux_heads import sampling
from models.aux_heads.sampling import sample


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random choice takes the first."""
    monkeypatch.setattr(sampling, "random_keys", lambda shape, device: torch.arange(shape[1]).float().expand(shape))


def mask(*indices: int, count: int = 8) -> Tensor:
    return torch.isin(torch.arange(count), torch.tensor(indices))[None]


@pytest.mark.parametrize(
    ("positives", "negatives", "taken", "kinds"),
    [
        ((1, 4, 6), (0, 2, 5), [1, 4, 0, 2], "++--"),  # at most half of 4
        ((3,), (0, 1, 2, 5), [3, 0, 1, 2], "+---"),  # negatives fill up
        ((6,), (0,), [6, 0], "+-  "),  # more there are not
        ((1, 4, 6), (), [1, 4], "++  "),  # the cap on positives holds without negatives too
        ((), (7,), [7], "-   "),
        ((), (), [], "    "),
    ],
)
def test_sample_caps_positives_and_fills_up_with_negatives(in_order, positives, negatives, taken, kinds) -> None:
    found = sample(mask(*positives), mask(*negatives), total=4, fraction=0.5)
    assert found.index[found.taken].tolist() == taken
    assert found.positive[0].tolist() == [k == "+" for k in kinds]
    assert found.negative[0].tolist() == [k == "-" for k in kinds]


def test_sample_takes_the_smallest_keys_and_hands_them_out_in_the_order_of_the_boxes(monkeypatch) -> None:
    keys = torch.tensor([[0.9, 0.8, 0.1, 0.7, 0.2, 0.6, 0.3, 0.5]])
    monkeypatch.setattr(sampling, "random_keys", lambda shape, device: keys)
    found = sample(mask(0, 1, 4, 6), mask(2, 3, 5, 7), total=4, fraction=0.5)
    assert found.index.tolist() == [[4, 6, 2, 7]]


def test_sample_chooses_every_box_equally_often() -> None:
    torch.manual_seed(0)
    images = 4000
    found = sample(mask(1, 4, 6).expand(images, -1), mask(0, 2, 3).expand(images, -1), total=3, fraction=0.34)
    assert found.positive.sum() == images and found.negative.sum() == 2 * images
    for which, members, share in ((found.positive, {1, 4, 6}, 1 / 3), (found.negative, {0, 2, 3}, 2 / 3)):
        often = Counter(found.index[which].tolist())
        assert set(often) == members
        # Five standard deviations of a binomial with 4000 draws.
        assert all(abs(n / images - share) < 5 * math.sqrt(share * (1 - share) / images) for n in often.values())


def test_sample_of_more_than_there_are_boxes_has_a_slot_for_each_box(in_order) -> None:
    found = sample(mask(0, count=3), mask(1, 2, count=3), total=100, fraction=0.5)
    assert found.index.tolist() == [[0, 1, 2]] and found.taken.all()
