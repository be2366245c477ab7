"""Training schemes as query groups: *adding a scheme is adding a file here* and a line to `BUILDERS`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from models.aux_heads import build_aux_heads
from models.aux_heads.adapter import SingleScaleAdapter
from models.backbones import backbone_stages
from models.groups.base import Context, GroupSource, OwnParts
from models.groups.collaborative import Collaborative
from models.groups.denoising import Denoising
from models.groups.hybrid import HybridEpoch, HybridLayer, OneToMany
from models.groups.matching import OneToOne
from models.groups.positives import PositiveQueries
from models.parts import build_decoder, build_encoder, build_heads, num_classes
from util.errors import UserError

__all__ = ["BUILDERS", "Context", "GroupSource", "OwnParts", "build_groups"]


def _one2one(args: Namespace) -> GroupSource | None:
    queries = args.num_queries_one2one
    if args.hybrid == "epoch":
        return HybridEpoch(queries, repeat=args.hybrid_k, epochs=round(args.hybrid_rho * args.epochs))
    if args.hybrid == "layer":
        return HybridLayer(queries, repeat=args.hybrid_k, first=args.hybrid_layers, layers=args.dec_layers)
    return OneToOne(queries)


def _one2many(args: Namespace) -> GroupSource | None:
    if args.num_queries_one2many == 0 or args.k_one2many == 0:
        return None
    return OneToMany(
        args.num_queries_one2many,
        repeat=args.k_one2many,
        weight=args.lambda_one2many,
        isolated=args.one2many_groups == "isolated",
        proposal_embed=build_heads(args).class_embed[-1] if args.one2many_proposals == "own" else None,
        own=_own_parts(args, OWN_PARTS.index(args.one2many_own)),
    )


def _denoising(args: Namespace) -> GroupSource | None:
    if args.dn_number == 0:
        return None
    classes = num_classes(args)
    return Denoising(
        args.hidden_dim,
        num_classes=classes,
        rows=(classes if args.dn_labelbook_size is None else args.dn_labelbook_size) + 1,
        layers=args.dec_layers,
        number=args.dn_number,
        label_noise=args.dn_label_noise_ratio,
        box_noise=args.dn_box_noise_scale,
        always_divide=args.dn_groups == "divided",
        eps=args.logit_eps,
    )


def _own_parts(args: Namespace, depth: int) -> OwnParts:
    """Return the first `depth` of class heads, box heads, decoder and encoder."""
    if depth == 0:
        return OwnParts()
    heads = build_heads(args)
    # Without an encoder of their own these queries have no proposals of their own: no head that nothing trains.
    layers = args.dec_layers + (args.two_stage and depth > 3)
    return OwnParts(
        class_embed=heads.class_embed[:layers],
        bbox_embed=heads.bbox_embed[:layers] if depth > 1 else None,
        decoder=build_decoder(args) if depth > 2 else None,
        encoder=build_encoder(args) if depth > 3 else None,
    )


def _collaborative(args: Namespace) -> GroupSource | None:
    if not args.aux_heads:
        return None
    adapter = None
    levels, finest = args.num_feature_levels, 4 * 2 ** backbone_stages(args)[0]
    if levels == 1:
        adapter, levels = SingleScaleAdapter(args.hidden_dim, stride=16 if args.dilation else 32), 4
        finest = 8
    strides = [finest * 2**level for level in range(levels + 1)]
    heads = build_aux_heads(args, strides)
    if args.eval_head and args.eval_head not in heads:
        raise UserError(f"--eval_head {args.eval_head}: these flags make the heads {', '.join(heads)}")
    return Collaborative(
        heads,
        _positive_queries(args, list(heads)),
        width=args.hidden_dim,
        strides=strides,
        loss_scale=args.dec_layers * args.lambda2,
        adapter=adapter,
        evaluated=args.eval_head,
    )


def _positive_queries(args: Namespace, heads: Sequence[str]) -> PositiveQueries | None:
    if args.lambda1 == 0:
        return None
    return PositiveQueries(
        args.hidden_dim,
        heads=heads,
        layers=args.dec_layers,
        weight=args.lambda1,
        limit=args.max_pos_coords,
        fill=args.aux_fill,
        full_embed=args.head_embed == "vector",
        boxes=args.query_pos == "box",
    )


# What `--one2many_own` adds, each to the one before (H-DETR, supplement, sharing).
OWN_PARTS = ("nothing", "class", "heads", "decoder", "encoder")

# In the order in which they take ranked queries; a scheme is on when its flags ask for something.
BUILDERS = (_one2one, _one2many, _collaborative, _denoising)


def build_groups(args: Namespace) -> list[GroupSource]:
    """Return the group sources that the flags ask for; the one that is evaluated lives in inference too.

    With `--eval` those that only training needs are not built, unless `--plot_assignment` draws them.

    Raises:
        UserError: for an unknown `--eval_group` or `--eval_head`.
    """
    built = [build(args) for build in BUILDERS]
    sources = [source for source in built if source is not None]
    groups = {source.name: source for source in sources if source.num_queries}
    if args.eval_group not in groups:
        raise UserError(
            f"--eval_group {args.eval_group}: these flags make the groups {', '.join(groups)}; auxiliary heads are "
            "evaluated with --eval_head NAME"
        )
    groups[args.eval_group].training_only = False
    bare = args.eval and not args.plot_assignment
    return [source for source in sources if not (bare and source.training_only)]
