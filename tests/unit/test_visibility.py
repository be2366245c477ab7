"""Self-attention in parts: who looks where, and the same results as one attention with a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.visibility import attention_parts, hide_padding, visibility
from util.structures import QueryGroup

CPU = torch.device("cpu")
Group = tuple[str, int, int | None, tuple[str, ...]]

HYBRID: list[Group] = [("one2one", 3, None, ()), ("one2many", 5, None, ())]
DINO: list[Group] = [("dn", 4, 2, ("one2one",)), ("one2one", 3, None, ())]
DINO_AFTER: list[Group] = [("one2one", 3, None, ()), ("dn", 4, 2, ("one2one",))]
H_DINO: list[Group] = [("one2one", 3, None, ()), ("one2many", 5, None, ()), ("dn", 4, 2, ("one2one",))]
FRIENDS: list[Group] = [("a", 2, None, ("b",)), ("b", 3, None, ("a",))]
NOBODY: list[Group] = [("one2one", 3, None, ()), ("dn", 0, None, ("one2one",))]
ISOLATED: list[Group] = [("one2many", 6, 3, ())]
ALL = [HYBRID, DINO, DINO_AFTER, H_DINO, FRIENDS, NOBODY, ISOLATED]


def groups_of(described: list[Group]) -> list[QueryGroup]:
    empty = torch.zeros
    return [
        QueryGroup(name, empty(2, size, 8), empty(2, size, 4), None, (), sees=sees, block=block)
        for name, size, block, sees in described
    ]


def ranges(described: list[Group], padding: Tensor | None = None) -> list[tuple[int, int, int, int, bool]]:
    """Return first and last row, first and last key, and whether there is a mask, of every part."""
    parts = attention_parts(groups_of(described), padding, 2, CPU)
    return [(p.rows.start, p.rows.stop, p.keys.start, p.keys.stop, p.blocked is not None) for p in parts]


def test_groups_that_are_blind_to_each_other_need_no_mask() -> None:
    assert ranges(HYBRID) == [(0, 3, 0, 3, False), (3, 8, 3, 8, False)]


def test_denoising_queries_need_a_mask_and_matching_queries_none() -> None:
    assert ranges(DINO) == [(0, 4, 0, 7, True), (4, 7, 4, 7, False)]
    assert ranges(DINO_AFTER) == [(0, 3, 0, 3, False), (3, 7, 0, 7, True)]


def test_a_group_between_two_that_see_each_other_is_masked() -> None:
    assert ranges(H_DINO) == [(0, 3, 0, 3, False), (3, 8, 3, 8, False), (8, 12, 0, 12, True)]


def test_groups_that_see_each_other_look_together() -> None:
    assert ranges(FRIENDS) == [(0, 5, 0, 5, False)]


def test_a_group_without_queries_takes_no_part() -> None:
    assert ranges(NOBODY) == [(0, 3, 0, 3, False)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("described", ALL)
def test_parts_give_what_one_masked_attention_gives(described: list[Group], padded: bool) -> None:
    torch.manual_seed(0)
    groups, attention = groups_of(described), nn.MultiheadAttention(8, 2, batch_first=True)
    query, x = torch.randn(2, 2, sum(map(len, groups)), 8)
    padding = None
    if padded:
        padding = torch.zeros(query.shape[:2], dtype=torch.bool)
        padding[1, 1:3] = True
    seen = visibility(groups, CPU)
    mask = hide_padding(None if seen is None else ~seen, padding, 2)
    expected, _ = attention(query, query, x, attn_mask=mask, need_weights=False)
    found = [
        attention(query[:, rows], query[:, keys], x[:, keys], attn_mask=blocked, need_weights=False)[0]
        for rows, keys, blocked in attention_parts(groups, padding, 2, CPU)
    ]
    torch.testing.assert_close(torch.cat(found, 1), expected)
