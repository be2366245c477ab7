"""Deformable decoder: pack query groups, attend, refine boxes, unpack (Deformable-DETR, sections 4.1 and 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.encoder import xavier_matrices
from models.heads import MLP, Heads, shift_box
from models.position_encoding import sine_embed_boxes
from models.visibility import AttentionPart, attention_parts
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

    def forward(
        self, x: Tensor, pos: Tensor, reference: Tensor, memory: Memory, parts: Sequence[AttentionPart]
    ) -> Tensor:
        """Return the queries (B, Q, D) after one layer.

        Args:
            x, pos: content and position of the queries, (B, Q, D).
            reference: (B, Q, 2 or 4) relative to the unpadded image.
            parts: who sees whom, see `attention_parts`.
        """
        query = x + pos
        attended = [self._look(query, x, part) for part in parts]
        attended = attended[0] if len(attended) == 1 else torch.cat(attended, 1)
        x = self.norm2(x + self.dropout2(attended))
        ratios = memory.valid_ratios.repeat(1, 1, reference.shape[-1] // 2)
        per_level = reference[:, :, None] * ratios[:, None]
        attended = self.cross_attn(x + pos, per_level, memory.tokens, memory.shapes, memory.padding)
        x = self.norm1(x + self.dropout1(attended))
        hidden = self.linear2(self.dropout3(self.linear1(x).relu()))
        return self.norm3(x + self.dropout4(hidden))

    def _look(self, query: Tensor, x: Tensor, part: AttentionPart) -> Tensor:
        """Return what self-attention gives the slots of `part`."""
        rows, keys, blocked = part
        return self.self_attn(query[:, rows], query[:, keys], x[:, keys], attn_mask=blocked, need_weights=False)[0]


class DeformableDecoder(nn.Module):
    """A stack of decoder layers over all query groups at once.

    Args:
        refine: every layer's box is the next layer's reference (iterative box refinement).
        look_forward_twice: the box of a layer is also trained through the box head of the layer before (DINO, section
            3.5); forward values do not change.
        anchors: the position of a query is made anew in every layer from its box (DAB-DETR, section 4.2); references
            are boxes then. Otherwise it is what the group brings, in all layers.
        scale_positions: from the second layer on these positions are multiplied by a function of the content.
        norm: a LayerNorm before the heads (DINO). The refinement takes the offset of what is not normalised, so a
            prediction is not the next reference.
        eps: clamps boxes before an offset is added to their logits.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        *,
        refine: bool,
        look_forward_twice: bool,
        anchors: bool = False,
        scale_positions: bool = False,
        norm: bool = False,
        eps: float = 1e-5,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.num_heads = layers[0].self_attn.num_heads
        self.refine = refine
        self.look_forward_twice = look_forward_twice
        self.eps = eps
        self.use_checkpoint = use_checkpoint
        width = layers[0].norm1.normalized_shape[0]
        self.norm = nn.LayerNorm(width) if norm else None
        self.query_scale = MLP(width, width, width, 2) if scale_positions else None
        self.ref_point_head = MLP(2 * width, width, width, 2) if anchors else None
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
        pos = None if self.ref_point_head else torch.cat([g.pos for g in groups], 1)
        reference = torch.cat([g.reference for g in groups], 1)
        looks = attention_parts(groups, _padding(groups), self.num_heads, x.device)
        parts = _by_heads(groups, heads)
        logits, boxes, embeds = [], [], []
        head_reference = reference  # what the head adds its offset to; differs from `reference` only in its gradient
        for i, layer in enumerate(self.layers):
            if self.ref_point_head:
                pos = self.position(x if i else None, reference, memory)
            if self.use_checkpoint and self.training:
                x = checkpoint(layer, x, pos, reference, memory, looks, use_reentrant=False)
            else:
                x = layer(x, pos, reference, memory, looks)
            class_heads = [(h.class_embed[i], slots) for h, slots in parts]
            box_heads = [(h.bbox_embed[i], slots) for h, slots in parts]
            embeds.append(self.norm(x) if self.norm else x)
            logits.append(at_least_float32(_apply(class_heads, embeds[-1])))
            delta = _apply(box_heads, embeds[-1])
            boxes.append(shift_box(delta, head_reference, self.eps))
            if self.refine and i + 1 < len(self.layers):
                delta = _apply(box_heads, x) if self.norm else delta
                same = not (self.look_forward_twice or self.norm)
                refined = boxes[-1] if same else shift_box(delta, reference, self.eps)
                reference = refined.detach()
                head_reference = refined if self.look_forward_twice else reference
        return _unpack(Predictions(torch.stack(logits), torch.stack(boxes), _padding(groups), embeds), groups)

    def position(self, content: Tensor | None, reference: Tensor, memory: Memory) -> Tensor:
        """Return the positions (B, Q, D) of queries with the boxes `reference` (B, Q, 4).

        Args:
            content: (B, Q, D) after the layer before; None in the first layer, where nothing scales the position.
        """
        # Relative to the padded finest map, like what cross-attention sees there.
        x, y, w, h = (reference * memory.valid_ratios[:, :1].repeat(1, 1, 2)).unbind(-1)
        width = self.ref_point_head.layers[-1].out_features
        position = self.ref_point_head(sine_embed_boxes(torch.stack([y, x, w, h], -1), width // 2))
        return position if self.query_scale is None or content is None else self.query_scale(content) * position


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
