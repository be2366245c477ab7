"""Building a detector, its criterion and its post-processor from the command line: here `args` ends."""

from __future__ import annotations

from argparse import Namespace
from functools import partial

from models.assign import build_assigners
from models.backbones import Joiner, build_backbone
from models.criterion import Criterion
from models.decoder import DecoderLayer, DeformableDecoder
from models.detector import Detector
from models.encoder import DeformableEncoder, EncoderLayer
from models.groups import build_groups
from models.heads import build_heads
from models.losses import box_regression, focal_classification
from models.neck import InputProjection
from models.position_encoding import build_position_encoding
from models.postprocess import PostProcessor
from models.transformer import DeformableTransformer, LearnedQueryTransformer, TwoStageTransformer
from ops.module import MSDeformAttn
from util.args import check_args
from util.errors import UserError

COCO_SLOTS = 91  # class outputs of published COCO weights: category ids 0..90, index 0 and ten ids unused


def build_model(args: Namespace) -> tuple[Detector, Criterion, PostProcessor]:
    """Return (model, criterion, postprocessor) for the parsed flags of `main.get_args_parser()`.

    Raises:
        UserError: for flags that do not go together, naming the one to change.
    """
    check_args(args)
    return build_detector(args), build_criterion(args), PostProcessor(args.topk)


def build_detector(args: Namespace) -> Detector:
    """Return the detector alone."""
    backbone = Joiner(build_backbone(args), build_position_encoding(args))
    return Detector(
        transformer=build_transformer(args),
        heads=build_heads(
            width=args.hidden_dim,
            num_classes=num_classes(args),
            dec_layers=args.dec_layers,
            refine=args.with_box_refine,
            two_stage=args.two_stage,
        ),
        neck=InputProjection(backbone.channels, args.num_feature_levels, args.hidden_dim),
        backbone=backbone,
        groups=build_groups(args),
        second_names=["bbox_embed"] * args.with_box_refine + ["class_embed"] * args.two_stage,
    )


def build_transformer(args: Namespace) -> DeformableTransformer:
    """Return encoder and decoder, with the origin of the queries that the flags ask for."""

    def attention(points: int) -> MSDeformAttn:
        return MSDeformAttn(args.hidden_dim, args.num_feature_levels, args.nheads, points)

    size = {"width": args.hidden_dim, "feedforward": args.dim_feedforward, "dropout": args.dropout}
    encoder = DeformableEncoder(
        [EncoderLayer(attention(args.enc_n_points), **size) for _ in range(args.enc_layers)],
        use_checkpoint=args.use_checkpoint,
    )
    decoder = DeformableDecoder(
        [DecoderLayer(attention(args.dec_n_points), heads=args.nheads, **size) for _ in range(args.dec_layers)],
        refine=args.with_box_refine,
        look_forward_twice=args.look_forward_twice,
        use_checkpoint=args.use_checkpoint,
    )
    shape = {"num_levels": args.num_feature_levels, "width": args.hidden_dim}
    if args.two_stage:
        return TwoStageTransformer(encoder, decoder, mixed_selection=args.mixed_selection, **shape)
    return LearnedQueryTransformer(encoder, decoder, **shape)


def build_criterion(args: Namespace) -> Criterion:
    """Return the losses with the weights of the flags."""
    return Criterion(
        assigners=build_assigners(args),
        terms={"labels": partial(focal_classification, alpha=args.focal_alpha), "boxes": box_regression},
        weights={
            "loss_ce": args.cls_loss_coef,
            "loss_bbox": args.bbox_loss_coef,
            "loss_giou": args.giou_loss_coef,
        },
        aux_loss=args.aux_loss,
    )


def num_classes(args: Namespace) -> int:
    """Return the number of class outputs: `--num_classes`, else what the kind of data set fixes."""
    if args.num_classes is not None:
        return args.num_classes
    if args.dataset_file == "synthetic":
        return args.synthetic_classes
    if args.train_json or args.val_json or args.category_ids == "contiguous":
        raise UserError(
            "the number of classes is not known: give --num_classes, or build the data set first and take "
            "dataset.num_classes (main.py does)"
        )
    return COCO_SLOTS
