"""Deformable decoder: pack query groups, attend, refine boxes, unpack (Deformable-DETR, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.encoder import xavier_matrices
from models.heads import Heads, shift_box
from models.visibility import hide_padding, visibility
from ops.module import MSDeformAttn, at_least_float32
from util.structures import Memory, Predictions, QueryGroup, SupervisedSet


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention into the memory, feed-forward.

    The norms are numbered in the order cross-attention, self-attention, feed-forward, as published.
    """

    def __init__(self, attention: MSDeformAttn, *, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.cross_attn = attention
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feedforward, width)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, pos: Tensor, reference: Tensor, memory: Memory, blocked: Tensor | None) -> Tensor:
        """Return the queries (B, Q, D) after one layer.

        Args:
            x, pos: content and position of the queries, (B, Q, D).
            reference: (B, Q, 2 or 4) relative to the unpadded image.
            blocked: (Q, Q), or (B * heads, Q, Q) where it depends on the image; bool, True where a query (row) may not
                see another (column); None = all may.
        """
        query = x + pos
        attended, _ = self.self_attn(query, query, x, attn_mask=blocked, need_weights=False)
        x = self.norm2(x + self.dropout2(attended))
        ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
        per_level = reference[:, :, None] * ratios[:, None]
        attended = self.cross_attn(x + pos, per_level, memory.tokens, memory.shapes, memory.padding)
        x = self.norm1(x + self.dropout1(attended))
        hidden = self.linear2(self.dropout3(self.linear1(x).relu()))
        return self.norm3(x + self.dropout4(hidden))


class DeformableDecoder(nn.Module):
    """A stack of decoder layers over all query groups at once.

    Args:
        refine: every layer's box is the next layer's reference (iterative box refinement).
        look_forward_twice: the box of a layer is also trained through the box head of the layer before (DINO, section
            3.5); forward values do not change.
    """

    def __init__(
        self, layers: Sequence[DecoderLayer], *, refine: bool, look_forward_twice: bool, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.num_heads = layers[0].self_attn.num_heads
        self.refine = refine
        self.look_forward_twice = look_forward_twice
        self.use_checkpoint = use_checkpoint
        xavier_matrices(self)

    def forward(
        self, groups: Sequence[QueryGroup], memory: Memory, heads: Heads | Sequence[Heads]
    ) -> dict[str, SupervisedSet]:
        """Decode `groups` under their visibility rule and return the set of each by name, cut out of one stack.

        Args:
            groups: their references are all points or all boxes.
            memory: of the encoder.
            heads: of all groups, or of each group where they do not share them.
        """
        x = torch.cat([g.content for g in groups], 1)
        pos = torch.cat([g.pos for g in groups], 1)
        reference = torch.cat([g.reference for g in groups], 1)
        may_see = visibility(groups, x.device)
        blocked = hide_padding(None if may_see is None else ~may_see, _padding(groups), self.num_heads)
        parts = _by_heads(groups, heads)
        logits, boxes, embeds = [], [], []
        head_reference = reference  # what the head adds its offset to; differs from `reference` only in its gradient
        for i, layer in enumerate(self.layers):
            if self.use_checkpoint and self.training:
                x = checkpoint(layer, x, pos, reference, memory, blocked, use_reentrant=False)
            else:
                x = layer(x, pos, reference, memory, blocked)
            embeds.append(x)
            delta = _apply([(h.bbox_embed[i], slots) for h, slots in parts], x)
            logits.append(at_least_float32(_apply([(h.class_embed[i], slots) for h, slots in parts], x)))
            boxes.append(shift_box(delta, head_reference))
            if self.refine:
                refined = shift_box(delta, reference) if self.look_forward_twice else boxes[-1]
                reference = refined.detach()
                head_reference = refined if self.look_forward_twice else reference
        return _unpack(Predictions(torch.stack(logits), torch.stack(boxes), _padding(groups), embeds), groups)


def _by_heads(groups: Sequence[QueryGroup], heads: Heads | Sequence[Heads]) -> list[tuple[Heads, slice]]:
    """Return runs of slots that share their heads."""
    each = [heads] * len(groups) if isinstance(heads, Heads) else heads
    parts: list[tuple[Heads, slice]] = []
    start = 0
    for group, own in zip(groups, each):
        stop = start + len(group)
        if parts and parts[-1][0] == own:
            parts[-1] = (own, slice(parts[-1][1].start, stop))
        else:
            parts.append((own, slice(start, stop)))
        start = stop
    return parts


def _apply(parts: Sequence[tuple[nn.Module, slice]], x: Tensor) -> Tensor:
    """Return what each module makes of its slots of `x` (B, Q, D), side by side."""
    if len(parts) == 1:
        return parts[0][0](x)
    return torch.cat([module(x[:, slots]) for module, slots in parts], 1)


def _unpack(stack: Predictions, groups: Sequence[QueryGroup]) -> dict[str, SupervisedSet]:
    """Cut the slots of all groups into one set per group."""
    result, start = {}, 0
    for group in groups:
        slots = slice(start, start + len(group))
        embeds = [x[:, slots] for x in stack.embeds]
        own = Predictions(stack.logits[:, :, slots], stack.boxes[:, :, slots], group.padding, embeds)
        result[group.name] = SupervisedSet(own, group.supervision, stack, start)
        start = slots.stop
    return result


def _padding(groups: Sequence[QueryGroup]) -> Tensor | None:
    """Return which slots of the stack are empty, (B, sum Q); None if no group has empty slots."""
    if all(g.padding is None for g in groups):
        return None
    full = [torch.zeros_like(g.content[..., 0], dtype=torch.bool) for g in groups]
    return torch.cat([none if g.padding is None else g.padding for g, none in zip(groups, full)], 1)
