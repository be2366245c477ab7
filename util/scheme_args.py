"""The flags of `main.py` that say how a detector is taught: queries, matching, schemes and loss weights."""

from __future__ import annotations

import argparse

SWITCH = argparse.BooleanOptionalAction


def add_queries(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("queries and matching")
    group.add_argument(
        "--num_queries_one2one",
        "--num_queries",
        default=300,
        type=int,
        help="one-to-one queries: those of inference",
    )
    group.add_argument(
        "--with_box_refine",
        action=SWITCH,
        default=False,
        help="iterative box refinement (Deformable-DETR, section 4.2)",
    )
    group.add_argument(
        "--two_stage",
        action=SWITCH,
        default=False,
        help="queries from encoder proposals (Deformable-DETR, section 4.2); needs --with_box_refine",
    )
    group.add_argument(
        "--mixed_selection",
        action=SWITCH,
        default=False,
        help="position from the proposal, content learned (H-DETR, DINO); needs --two_stage",
    )
    group.add_argument(
        "--look_forward_twice",
        action=SWITCH,
        default=False,
        help="the box loss of a layer trains the layer before it too (DINO); needs --with_box_refine",
    )
    group.add_argument("--set_cost_class", default=2.0, type=float, help="class weight in the matching cost")
    group.add_argument("--set_cost_bbox", default=5.0, type=float, help="L1 weight in the matching cost")
    group.add_argument("--set_cost_giou", default=2.0, type=float, help="GIoU weight in the matching cost")


def add_hybrid(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("hybrid matching (H-DETR, section 3.2)")
    group.add_argument(
        "--num_queries_one2many", default=0, type=int, help="T, training-only queries; 0 switches the branch off"
    )
    group.add_argument("--k_one2many", default=5, type=int, help="K, how often a target may be matched; 0: branch off")
    group.add_argument("--lambda_one2many", default=1.0, type=float, help="weight of the one-to-many losses")
    group.add_argument(
        "--one2many_groups",
        default="joint",
        choices=["joint", "isolated"],
        help="joint: T queries see each other and share K copies of the targets; isolated: K blind groups of T / K "
        "queries, each matched one-to-one (H-TransTrack)",
    )
    group.add_argument(
        "--one2many_proposals",
        default="rank",
        choices=["rank", "own"],
        help="with --two_stage, the T proposals are rank: those after the one-to-one queries'; own: the best of the "
        "rest for a second class head, taught with K + 1 copies (H-DETR, supplement)",
    )
    group.add_argument(
        "--one2many_own",
        default="nothing",
        choices=["nothing", "class", "heads", "decoder", "encoder"],
        help="what the one-to-many branch does not share: class heads; and box heads; and decoder; and encoder",
    )
    group.add_argument(
        "--hybrid",
        default="branch",
        choices=["branch", "epoch", "layer"],
        help="branch: the flags above; epoch, layer: one-to-many for the queries of inference, in the first epochs or "
        "on the first decoder layers",
    )
    group.add_argument("--hybrid_k", default=10, type=int, help="K of --hybrid epoch and layer")
    group.add_argument(
        "--hybrid_rho", default=2 / 3, type=float, help="share of one-to-many epochs in --hybrid epoch, rounded"
    )
    group.add_argument("--hybrid_layers", default=4, type=int, help="one-to-many decoder layers L1 in --hybrid layer")


def add_auxiliary(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("auxiliary heads (Co-DETR, section 3)")
    group.add_argument(
        "--aux_heads",
        nargs="*",
        default=[],
        choices=["faster_rcnn", "atss", "retinanet", "fcos", "paa", "gfl"],
        help="heads that teach the encoder in training, and make decoder queries of their positives; the second of "
        "`atss atss` is atss2",
    )
    group.add_argument(
        "--lambda1", default=1.0, type=float, help="weight of the losses of those queries; 0: there are none"
    )
    group.add_argument(
        "--lambda2", default=2.0, type=float, help="weight of the losses of the heads, times --dec_layers"
    )
    group.add_argument("--max_pos_coords", default=300, type=int, help="most queries of a head in an image")
    group.add_argument(
        "--aux_fill",
        default="negatives",
        choices=["negatives", "masked"],
        help="what fills up images with fewer positives: negatives of the head, taught as background; or empty slots",
    )
    group.add_argument(
        "--head_embed",
        default="number",
        choices=["number", "vector"],
        help="what a head adds to the position of its queries: one learned number, as published, or --hidden_dim",
    )
    group.add_argument("--aux_convs", default=1, type=int, help="convolutions in each tower of a dense head")
    group.add_argument("--roi_samples", default=512, type=int, help="regions of an image that faster_rcnn learns from")
    group.add_argument("--eval_head", default="", help="evaluate this auxiliary head alone in place of the decoder")


def add_losses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss weights")
    group.add_argument("--cls_loss_coef", default=2.0, type=float, help="focal loss")
    group.add_argument("--bbox_loss_coef", default=5.0, type=float, help="L1 of cxcywh")
    group.add_argument("--giou_loss_coef", default=2.0, type=float, help="1 - GIoU")
    group.add_argument("--focal_alpha", default=0.25, type=float, help="weight of positives in the focal loss")
    group.add_argument(
        "--no_aux_loss", dest="aux_loss", action="store_false", help="supervise only the last decoder layer"
    )
