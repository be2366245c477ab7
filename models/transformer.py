"""Encoder, decoder and where the decoder's first queries come from.

There is one class per origin of the queries, so that its layers have the published names
(`transformer.reference_points`, `transformer.enc_output`, ...). A training scheme (`models/groups/`) asks for ranked
rows of these queries and does not know the origin: every scheme works with learned and with proposal queries. The
origins of DAB and DINO, whose queries are boxes in every layer, are in `models.anchors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models import proposals
from models.decoder import DeformableDecoder
from models.encoder import DeformableEncoder, xavier_matrices
from models.heads import Heads
from models.position_encoding import sine_embed_boxes
from ops.module import at_least_float32
from util.structures import Claim, Memory, Predictions, Seeds


class DeformableTransformer(nn.Module):
    """What all origins of the queries share: level embedding, encoder and decoder."""

    proposals_name = "encoder"  # of the set of proposals, in two-stage
    class_agnostic = True  # proposals are taught "object"

    def __init__(self, encoder: DeformableEncoder, decoder: DeformableDecoder, *, num_levels: int, width: int) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(num_levels, width))
        self.encoder = encoder
        self.decoder = decoder

    def encode(
        self,
        maps: Sequence[Tensor],
        positions: Sequence[Tensor],
        paddings: Sequence[Tensor],
        encoder: nn.Module | None = None,
    ) -> Memory:
        """Encode the projected maps [(B, D, h, w)]; the level embedding is added to the position encodings here.

        `encoder` takes the place of the shared one.
        """
        levels = [p.to(m.dtype) + e[:, None, None] for p, m, e in zip(positions, maps, self.level_embed)]
        return (encoder or self.encoder)(maps, levels, paddings)

    def own_heads(self, heads: Heads) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Return class and box heads as they lie at the top of the detector; an origin may keep those of proposals."""
        return nn.ModuleList(heads.class_embed), nn.ModuleList(heads.bbox_embed)

    def all_heads(self, class_embed: nn.ModuleList, bbox_embed: nn.ModuleList) -> Heads:
        """Return the heads of the decoder layers and of the proposals, given those at the top of the detector."""
        return Heads(class_embed, bbox_embed)

    def make_tables(self, rows: int) -> dict[str, nn.Embedding]:
        """Return the learned tables with a row per query that lie at the top of the detector, by published name.

        Tables that published files hold inside the transformer are put there.
        """
        return {}

    def seeds(self, memory: Memory, heads: Heads, tables: Mapping[str, Tensor], claims: Sequence[Claim]) -> list[Seeds]:
        """Return the first queries of each claim.

        Args:
            memory: of the encoder.
            heads: those of the encoder proposals, in two-stage.
            tables: weights of what `make_tables` returned.
            claims: which ranks are wanted; they do not overlap. There may be fewer queries than a claim asks for.
        """
        raise NotImplementedError


class LearnedQueryTransformer(DeformableTransformer):
    """Queries are rows of a table: first half position, second half content (Deformable-DETR, section 4.1).

    The reference point of a query is a linear function of its position and the same for all images.
    """

    def __init__(self, encoder: DeformableEncoder, decoder: DeformableDecoder, *, num_levels: int, width: int) -> None:
        super().__init__(encoder, decoder, num_levels=num_levels, width=width)
        self.reference_points = nn.Linear(width, 2)
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)

    def make_tables(self, rows: int) -> dict[str, nn.Embedding]:
        return {"query_embed": nn.Embedding(rows, 2 * self.reference_points.in_features)}

    def seeds(self, memory: Memory, heads: Heads, tables: Mapping[str, Tensor], claims: Sequence[Claim]) -> list[Seeds]:
        rows = tables["query_embed"][: max(c.rows.stop for c in claims)].expand(memory.tokens.shape[0], -1, -1)
        pos, content = rows.chunk(2, dim=-1)
        reference = at_least_float32(self.reference_points(pos)).sigmoid()
        return [Seeds(content[:, c.rows], pos[:, c.rows], reference[:, c.rows]) for c in claims]


class TwoStageTransformer(DeformableTransformer):
    """Queries come from the best encoder proposals (Deformable-DETR, section 4.2).

    Args:
        mixed_selection: only the position comes from the proposal, the content is row i of a learned table for the
            proposal of rank i (DINO, section 3.4; H-DETR's tricks).
    """

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        *,
        num_levels: int,
        width: int,
        mixed_selection: bool,
    ) -> None:
        super().__init__(encoder, decoder, num_levels=num_levels, width=width)
        self.mixed_selection = mixed_selection
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.pos_trans = nn.Linear(2 * width, 2 * width)
        self.pos_trans_norm = nn.LayerNorm(2 * width)
        xavier_matrices(self.enc_output)
        xavier_matrices(self.pos_trans)

    def make_tables(self, rows: int) -> dict[str, nn.Embedding]:
        return {"query_embed": nn.Embedding(rows, self.enc_output.out_features)} if self.mixed_selection else {}

    def propose(self, memory: Memory, heads: Heads) -> tuple[Predictions, Tensor, Tensor]:
        """Score every token as a proposal.

        Returns:
            The predictions of the set `encoder` (L = 1, N = S), the box logits (B, S, 4), +inf at invalid tokens, and
            the projected tokens (B, S, D) that the heads saw. Invalid tokens are zeroed before the projection, so they
            all carry the same vector and the same score.
        """
        prior, invalid = proposals.proposal_logits(memory.padding, memory.shapes)
        tokens = memory.tokens.masked_fill(invalid[..., None], 0.0)
        tokens = self.enc_output_norm(self.enc_output(tokens))
        scores = at_least_float32(heads.class_embed[-1](tokens))
        box_logits = at_least_float32(heads.bbox_embed[-1](tokens)) + prior
        return Predictions(scores[None], box_logits.sigmoid()[None], embeds=[tokens]), box_logits, tokens

    def seeds(self, memory: Memory, heads: Heads, tables: Mapping[str, Tensor], claims: Sequence[Claim]) -> list[Seeds]:
        encoder, box_logits, tokens = self.propose(memory, heads)
        ranked = [c.ranks.stop for c in claims if c.scorer is None]
        best = proposals.select_top(_objectness(encoder), max(ranked)) if ranked else None
        chosen: list[Tensor] = []
        seen: list[Predictions] = []
        for claim in claims:
            if claim.scorer is None:
                chosen.append(best[:, claim.ranks])
                seen.append(encoder)
            else:
                scores = at_least_float32(claim.scorer(tokens))
                seen.append(Predictions(scores[None], encoder.boxes, embeds=[tokens]))
                chosen.append(proposals.select_unused(_objectness(seen[-1]), chosen, claim.count))
        boxes = proposals.gather_rows(box_logits.detach(), torch.cat(chosen, 1)).sigmoid()
        embedded = sine_embed_boxes(boxes, self.pos_trans.in_features // 4)
        pos, content = self.pos_trans_norm(self.pos_trans(embedded)).chunk(2, dim=-1)
        sizes = [index.shape[1] for index in chosen]
        contents = content.split(sizes, 1)
        if self.mixed_selection:
            # The second half is thrown away, but the norm still runs over both halves.
            table = tables["query_embed"]
            rows = [table[c.start : c.start + size] for c, size in zip(claims, sizes)]
            contents = [row.expand(boxes.shape[0], -1, -1) for row in rows]
        return [Seeds(*parts) for parts in zip(contents, pos.split(sizes, 1), boxes.split(sizes, 1), seen)]


def _objectness(encoder: Predictions) -> Tensor:
    """Return the scores (B, S) of proposals: class 0 is "object", where the class-agnostic loss puts all targets."""
    return encoder.logits[0, ..., 0].detach()
