"""Empty decoder slots: nobody sees them, and they break nothing."""

from __future__ import annotations

import torch

from models.decoder import DecoderLayer, DeformableDecoder
from models.heads import heads_of
from models.visibility import hide_padding
from ops.module import MSDeformAttn
from util.structures import Memory, QueryGroup


def test_empty_slots_see_themselves_and_what_is_there_and_nobody_sees_them() -> None:
    padding = torch.tensor([[False, False, True], [True, True, True]])
    first = [[False, False, True], [False, False, True], [False, False, False]]
    second = [[False, True, True], [True, False, True], [True, True, False]]
    assert hide_padding(None, padding, 2).tolist() == [first, first, second, second]
    blocked = torch.tensor([[False, True, False], [False, False, False], [False, False, False]])
    assert hide_padding(blocked, padding, 1)[0].tolist() == [[False, True, True], *first[1:]]
    assert hide_padding(blocked, None, 2) is blocked


def test_padded_queries_change_nothing_for_the_others() -> None:
    torch.manual_seed(0)
    attention = [MSDeformAttn(16, 1, 2, 2) for _ in range(2)]
    layers = [DecoderLayer(a, width=16, heads=2, feedforward=32, dropout=0.0) for a in attention]
    decoder = DeformableDecoder(layers, refine=True, look_forward_twice=True)
    heads = heads_of(width=16, num_classes=3, dec_layers=2, refine=True, two_stage=False)
    tokens = torch.randn(2, 6, 16)
    memory = Memory(tokens, torch.zeros(2, 6, dtype=torch.bool), ((2, 3),), torch.ones(2, 1, 2))
    content, pos = torch.randn(2, 2, 3, 16).requires_grad_()
    reference = torch.rand(2, 3, 4)
    padding = torch.tensor([[False, False, True], [True, True, True]])

    def logits(slots: slice, padding: torch.Tensor | None) -> torch.Tensor:
        group = QueryGroup("co", content[:, slots], reference[:, slots], pos[:, slots], (), padding=padding)
        return decoder([group], memory, heads)["co"].predictions.logits

    padded, alone = logits(slice(3), padding), logits(slice(2), None)
    torch.testing.assert_close(padded[:, 0, :2], alone[:, 0])
    assert not torch.allclose(logits(slice(3), None)[:, 0, :2], alone[:, 0])
    padded.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())
