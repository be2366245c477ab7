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


def add_soft(parser: argparse.ArgumentParser) -> None:
    """Matchers and their readings; None stands for the default of the matcher."""
    group = parser.add_argument_group("matchers without a solver (Beyond Hungarian, arXiv 2603.08514)")
    _add_matchers(group)
    _add_choice(group)
    _add_probe(group)
    _add_correspondence(group)


def _add_matchers(group: argparse._ArgumentGroup) -> None:
    """Who matches, and what the class loss makes of it."""
    group.add_argument(
        "--matcher",
        default="hungarian",
        choices=["hungarian", "cost-greedy", "soft", "soft-literal"],
        help="how queries get objects: optimally, on the CPU; in rounds of bids by cost; by learned correspondence; "
        "the same as close to the paper as is known",
    )
    group.add_argument(
        "--plot_correspondence",
        default=0,
        type=int,
        help="with --matcher soft: draw the correspondences of so many evaluated images over the epochs into "
        "OUTPUT_DIR/correspondence",
    )
    group.add_argument(
        "--enc_matcher",
        choices=["hungarian", "cost-greedy", "soft"],
        help=_taken(
            "the same for the proposals of --two_stage", "hungarian with --matcher hungarian, else cost-greedy"
        ),
    )
    group.add_argument(
        "--greedy_rounds", type=int, help=_taken("rounds of bids of cost-greedy and of --scg rounds", "8")
    )
    group.add_argument(
        "--cls_target",
        choices=["hard", "weight", "quality", "pairwise"],
        help=_taken(
            "target of the class loss: 1; the weight of the pair; the IoU; or a loss for each pair, times its weight",
            "weight with --matcher soft, else hard",
            "pairwise",
        ),
    )
    group.add_argument(
        "--extra_cls",
        choices=["ignore", "positive"],
        help=_taken("with --cls_target hard and quality, class of all but the strongest pair of an object", "ignore"),
    )
    group.add_argument(
        "--soft_background",
        action=SWITCH,
        default=None,
        help=_taken("queries without an object learn to say nothing", "on"),
    )


def _add_choice(group: argparse._ArgumentGroup) -> None:
    """Which correspondences become pairs, and with what weight."""
    group.add_argument("--soft_extra_layers", type=int, help=_taken("first decoder layers with extra positives", "0"))
    group.add_argument(
        "--scg",
        choices=["colpeak", "rowpeak", "mutual", "rounds"],
        help=_taken("which correspondences are kept, see models/assign/scg.py", "colpeak"),
    )
    group.add_argument("--scg_rho", type=float, help=_taken("smallest share of the peak that is kept", "0.5"))
    group.add_argument(
        "--scg_switch", type=float, help=_taken("share of training after which --scg is rounds", "1, never")
    )
    group.add_argument(
        "--soft_norm",
        choices=["row", "column", "global", "none"],
        help=_taken("what of the weights has the sum 1: of an object, of a query, the mean over objects", "row"),
    )


def _add_probe(group: argparse._ArgumentGroup) -> None:
    """What makes correspondences."""
    group.add_argument(
        "--probe_logits",
        choices=["cosine", "dot"],
        help=_taken("cosine times a learned scale, or scaled dot product", "cosine", "dot"),
    )
    group.add_argument("--logit_scale_max", type=float, help=_taken("largest scale of cosine logits", "30"))
    group.add_argument(
        "--box_code", choices=["sine", "raw"], help=_taken("how the probe sees boxes", "sine and raw", "raw")
    )
    group.add_argument(
        "--key_box",
        action=SWITCH,
        default=None,
        help=_taken("the probe sees the predicted boxes of queries", "on", "off"),
    )
    group.add_argument(
        "--probe_per_layer",
        action=SWITCH,
        default=None,
        help=_taken("a probe for each supervised layer and one for proposals, in place of one for all", "off"),
    )


def _add_correspondence(group: argparse._ArgumentGroup) -> None:
    """How correspondences compete and what teaches the probe."""
    group.add_argument(
        "--probe_value",
        choices=["cost", "prediction"],
        help=_taken("what the correspondence loss averages: costs of pairs, or predictions, before their cost", "cost"),
    )
    group.add_argument(
        "--layer_consistency",
        choices=["none", "last"],
        help=_taken("last: the pairs and weights of the last decoder layer teach all layers", "none"),
    )
    group.add_argument(
        "--column_competition",
        choices=["none", "dual", "center", "sinkhorn"],
        help=_taken("how objects compete for a query", "dual", "none"),
    )
    group.add_argument(
        "--soft_warmup",
        choices=["none", "prior", "teacher"],
        help=_taken("first help for the probe: the distance of boxes; or Hungarian pairs, on the CPU", "prior", "none"),
    )
    group.add_argument(
        "--soft_warmup_share", type=float, help=_taken("share of training over which that help fades", "0.1")
    )
    group.add_argument(
        "--probe_entropy",
        type=float,
        help=_taken("reward for undecided correspondences, which fades over a fifth of training", "0"),
    )
    group.add_argument(
        "--corr_grad",
        choices=["probe", "probe+query", "full"],
        help=_taken("what the correspondence loss trains; full: predictions too", "probe", "full"),
    )
    group.add_argument(
        "--corr_class",
        choices=["match", "full"],
        help=_taken("class cost in that loss: that of matching, or of all classes of the query", "match", "full"),
    )
    group.add_argument(
        "--live_weights", action=SWITCH, default=None, help=_taken("the other losses train the probe too", "off", "on")
    )


def _taken(text: str, value: str, literal: str = "") -> str:
    """Return a help line with the default of the matcher; `literal` is that of soft-literal, if it differs."""
    also = f"; soft-literal: {literal}" if literal else ""
    return f"{text} (default: {value}{also})%(default).0s"  # no characters of None, which argparse would add


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
        help="what a head adds to the position of its queries: one learned number, as published, or --hidden_dim; "
        "nothing with --query_pos box",
    )
    group.add_argument("--aux_convs", default=1, type=int, help="convolutions in each tower of a dense head")
    group.add_argument("--roi_samples", default=512, type=int, help="regions of an image that faster_rcnn learns from")
    group.add_argument(
        "--eval_head",
        default="",
        help="evaluate this auxiliary head alone in place of the decoder; it keeps 100 detections at most",
    )


def add_losses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss weights")
    group.add_argument("--cls_loss_coef", default=2.0, type=float, help="focal loss")
    group.add_argument("--bbox_loss_coef", default=5.0, type=float, help="L1 of cxcywh")
    group.add_argument("--giou_loss_coef", default=2.0, type=float, help="1 - GIoU")
    group.add_argument(
        "--corr_loss_coef",
        default=1.0,
        type=float,
        help="correspondence loss of --matcher soft; with AdamW it changes next to nothing if only the probe has a "
        "gradient of it (--corr_grad probe)",
    )
    group.add_argument(
        "--focal_alpha",
        default=0.25,
        type=float,
        help="weight of positives in the focal loss, 1 - it of negatives; -1: both 1 (Co-DINO, with --cls_target "
        "quality)",
    )
    group.add_argument(
        "--no_aux_loss", dest="aux_loss", action="store_false", help="supervise only the last decoder layer"
    )
