"""Decoder queries that are boxes in every layer: learned ones (DAB) and proposals ranked by class (DINO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models import proposals
from models.decoder import DeformableDecoder
from models.encoder import DeformableEncoder, xavier_matrices
from models.heads import Heads
from models.transformer import DeformableTransformer
from ops.module import at_least_float32
from util.boxes import inverse_sigmoid
from util.structures import Claim, Memory, Predictions, Seeds

LOGIT_EPS = 1e-3  # of the clamped logit in DAB and DINO


class LearnedAnchorTransformer(DeformableTransformer):
    """A query is a learned box and learned content, the same for all images (DAB-Deformable-DETR).

    Args:
        num_patterns: so many content vectors are added to every query in turn; all queries of the first pattern come
            first. 0: none.
        random_xy: centres start uniform in the image (published intention: and stay there; only the start has an
            effect there).
    """

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        *,
        num_levels: int,
        width: int,
        num_patterns: int = 0,
        random_xy: bool = False,
    ) -> None:
        super().__init__(encoder, decoder, num_levels=num_levels, width=width)
        self.width, self.random_xy = width, random_xy
        self.num_patterns = num_patterns

    @torch.no_grad()
    def make_tables(self, rows: int) -> dict[str, nn.Embedding]:
        content, boxes = nn.Embedding(rows, self.width), nn.Embedding(rows, 4)
        if self.random_xy:
            boxes.weight[:, :2] = inverse_sigmoid(torch.rand(rows, 2), LOGIT_EPS)
        patterns = {"patterns_embed": nn.Embedding(self.num_patterns, self.width)} if self.num_patterns else {}
        return {"tgt_embed": content, "refpoint_embed": boxes, **patterns}

    def seeds(self, memory: Memory, heads: Heads, tables: Mapping[str, Tensor], claims: Sequence[Claim]) -> list[Seeds]:
        images, found = memory.tokens.shape[0], []
        for claim in claims:
            content, reference = (tables[name][claim.rows] for name in ("tgt_embed", "refpoint_embed"))
            if self.num_patterns:
                content = (content + tables["patterns_embed"][:, None]).flatten(0, 1)
                reference = reference.repeat(self.num_patterns, 1)
            reference = at_least_float32(reference).sigmoid()
            found.append(Seeds(content.expand(images, -1, -1), None, reference.expand(images, -1, -1)))
        return found


class AnchorProposalTransformer(DeformableTransformer):
    """The best encoder proposals by their best class give the boxes (DINO, section 3.4, mixed query selection).

    Only chosen proposals are taught, with their real classes: the set `interm`. The heads of proposals are part of the
    transformer, as published.

    Args:
        mixed_selection: the content of the proposal of rank i is row i of a learned table; False: its encoder token.
        normal_content: that table starts as standard normal, as in Co-DINO; False: Xavier, as in DINO.
    """

    proposals_name = "interm"
    class_agnostic = False

    def __init__(
        self,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        *,
        num_levels: int,
        width: int,
        mixed_selection: bool = True,
        normal_content: bool = False,
    ) -> None:
        super().__init__(encoder, decoder, num_levels=num_levels, width=width)
        self.mixed_selection, self.normal_content, self.width = mixed_selection, normal_content, width
        # Registered here, made later: the order of parameters is that of published optimiser states.
        self.register_module("tgt_embed", None)
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.register_module("enc_out_bbox_embed", None)
        self.register_module("enc_out_class_embed", None)
        xavier_matrices(self.enc_output)

    def make_tables(self, rows: int) -> dict[str, nn.Embedding]:
        if self.mixed_selection:
            self.tgt_embed = nn.Embedding(rows, self.width)
            if not self.normal_content:
                nn.init.xavier_uniform_(self.tgt_embed.weight)
        return {}

    def own_heads(self, heads: Heads) -> tuple[nn.ModuleList, nn.ModuleList]:
        *class_heads, self.enc_out_class_embed = heads.class_embed
        *box_heads, self.enc_out_bbox_embed = heads.bbox_embed
        return nn.ModuleList(class_heads), nn.ModuleList(box_heads)

    def all_heads(self, class_embed: nn.ModuleList, bbox_embed: nn.ModuleList) -> Heads:
        return Heads([*class_embed, self.enc_out_class_embed], [*bbox_embed, self.enc_out_bbox_embed])

    def seeds(self, memory: Memory, heads: Heads, tables: Mapping[str, Tensor], claims: Sequence[Claim]) -> list[Seeds]:
        prior, invalid = proposals.proposal_logits(memory.padding, memory.shapes)
        tokens = self.enc_output_norm(self.enc_output(memory.tokens.masked_fill(invalid[..., None], 0.0)))
        scores = at_least_float32(heads.class_embed[-1](tokens))
        ranked = [c.ranks.stop for c in claims if c.scorer is None]
        best = proposals.select_top(scores.detach().amax(-1), max(ranked)) if ranked else None
        found, used = [], []
        for claim in claims:
            own = scores if claim.scorer is None else at_least_float32(claim.scorer(tokens))
            if claim.scorer is None:
                used.append(best[:, claim.ranks])
            else:
                used.append(proposals.select_unused(own.detach().amax(-1), used, claim.count))
            found.append(self._seeds(claim, used[-1], tokens, own, prior, heads))
        return found

    def _seeds(self, claim: Claim, index: Tensor, tokens: Tensor, scores: Tensor, prior: Tensor, heads: Heads) -> Seeds:
        """Return the queries that the tokens `index` (B, K) become; the box head sees only these."""
        chosen = proposals.gather_rows(tokens, index)
        delta = at_least_float32(heads.bbox_embed[-1](chosen))
        boxes = (delta + proposals.gather_rows(prior, index)).sigmoid()
        content = chosen.detach()
        if self.mixed_selection:
            rows = self.tgt_embed.weight[claim.start : claim.start + index.shape[1]]
            content = rows.expand(tokens.shape[0], -1, -1)
        proposed = Predictions(proposals.gather_rows(scores, index)[None], boxes[None], embeds=[chosen])
        return Seeds(content, None, boxes.detach(), proposed if claim.count else None)
