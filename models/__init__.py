"""Building a detector, its criterion and its post-processor from the command line: here `args` ends."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from models.anchors import AnchorProposalTransformer, LearnedAnchorTransformer
from models.assign import HungarianMatcher, build_assigners, class_target
from models.backbones import Joiner, build_backbone
from models.criterion import Criterion
from models.detector import Detector
from models.groups import build_groups
from models.losses import box_regression, focal_classification, pairwise_classification, soft_classification
from models.neck import InputProjection
from models.parts import COCO_SLOTS, build_decoder, build_encoder, build_heads, num_classes
from models.position_encoding import build_position_encoding
from models.postprocess import PostProcessor
from models.transformer import DeformableTransformer, LearnedQueryTransformer, TwoStageTransformer
from util.arg_rules import check_args

__all__ = [
    "COCO_SLOTS",
    "build_criterion",
    "build_detector",
    "build_model",
    "build_postprocessor",
    "build_transformer",
    "num_classes",
]


def build_model(args: Namespace) -> tuple[Detector, Criterion, PostProcessor]:
    """Return (model, criterion, postprocessor) for the parsed flags of `main.get_args_parser()`.

    Raises:
        UserError: for flags that do not go together, naming the one to change.
    """
    check_args(args)
    return (
        build_detector(args),
        build_criterion(args),
        build_postprocessor(args),
    )


def build_detector(args: Namespace) -> Detector:
    """Return the detector alone."""
    backbone = Joiner(build_backbone(args), build_position_encoding(args))
    return Detector(
        transformer=build_transformer(args),
        heads=build_heads(args),
        neck=InputProjection(backbone.channels, args.num_feature_levels, args.hidden_dim),
        backbone=backbone,
        groups=build_groups(args),
        second_names=["bbox_embed"] * args.with_box_refine + ["class_embed"] * args.two_stage,
    )


def build_transformer(args: Namespace) -> DeformableTransformer:
    """Return encoder and decoder, with the origin of the queries that the flags ask for."""
    encoder, decoder = build_encoder(args), build_decoder(args)
    shape = {"num_levels": args.num_feature_levels, "width": args.hidden_dim}
    if args.query_pos == "box":
        if args.two_stage:
            normal = args.content_init == "normal"
            return AnchorProposalTransformer(
                encoder, decoder, mixed_selection=args.mixed_selection, normal_content=normal, **shape
            )
        return LearnedAnchorTransformer(
            encoder, decoder, num_patterns=args.num_patterns, random_xy=args.random_refpoints_xy, **shape
        )
    if args.two_stage:
        return TwoStageTransformer(encoder, decoder, mixed_selection=args.mixed_selection, **shape)
    return LearnedQueryTransformer(encoder, decoder, **shape)


def build_postprocessor(args: Namespace) -> PostProcessor:
    """Return what turns the predictions of the evaluated queries, or of the evaluated head, into detections."""
    return PostProcessor(
        args.topk,
        nms_iou=args.nms_iou,
        soft_nms_iou=args.soft_nms_iou,
        clip=args.clip_boxes,
        group=args.eval_head or args.eval_group,
    )


def build_criterion(args: Namespace) -> Criterion:
    """Return the losses with the weights of the flags."""
    target, assigners = class_target(args), build_assigners(args)
    if target == "pairwise":
        labels = pairwise_classification
    elif target == "hard" and all(isinstance(a, HungarianMatcher) for a in assigners.values()):
        labels = focal_classification  # the same for pairs of one weight, and a kernel instead of five
    else:
        labels = partial(soft_classification, quality=target == "quality")
    return Criterion(
        assigners=assigners,
        terms={
            "labels": partial(labels, alpha=args.focal_alpha),
            "boxes": partial(box_regression, giou_eps=args.giou_eps),
        },
        weights={
            "loss_ce": args.cls_loss_coef,
            "loss_bbox": args.bbox_loss_coef,
            "loss_giou": args.giou_loss_coef,
            "loss_corr": args.corr_loss_coef,
        },
        aux_loss=args.aux_loss,
    )
