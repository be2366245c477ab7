"""Building the parts that a scheme may want a second time: `args` ends here too."""

from __future__ import annotations

from argparse import Namespace

from models.decoder import DecoderLayer, DeformableDecoder
from models.encoder import DeformableEncoder, EncoderLayer
from models.heads import Heads, heads_of
from ops.module import MSDeformAttn
from util.errors import UserError

COCO_SLOTS = 91  # class outputs of published COCO weights: category ids 0..90, index 0 and ten ids unused


def build_encoder(args: Namespace) -> DeformableEncoder:
    """Return the encoder that the flags ask for."""
    layers = [EncoderLayer(_attention(args, args.enc_n_points), **_size(args)) for _ in range(args.enc_layers)]
    return DeformableEncoder(layers, use_checkpoint=args.use_checkpoint)


def build_decoder(args: Namespace) -> DeformableDecoder:
    """Return the decoder that the flags ask for."""
    return DeformableDecoder(
        [
            DecoderLayer(_attention(args, args.dec_n_points), heads=args.nheads, **_size(args))
            for _ in range(args.dec_layers)
        ],
        refine=args.with_box_refine,
        look_forward_twice=args.look_forward_twice,
        anchors=args.query_pos == "box",
        scale_positions=args.query_scale,
        norm=args.decoder_norm,
        eps=args.logit_eps,
        use_checkpoint=args.use_checkpoint,
    )


def build_heads(args: Namespace) -> Heads:
    """Return class and box heads of all decoder layers, and in two-stage of the encoder proposals."""
    return heads_of(
        width=args.hidden_dim,
        num_classes=num_classes(args),
        dec_layers=args.dec_layers,
        refine=args.with_box_refine,
        two_stage=args.two_stage,
        share=args.share_heads,
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


def _attention(args: Namespace, points: int) -> MSDeformAttn:
    return MSDeformAttn(args.hidden_dim, args.num_feature_levels, args.nheads, points)


def _size(args: Namespace) -> dict[str, float]:
    return {"width": args.hidden_dim, "feedforward": args.dim_feedforward, "dropout": args.dropout}
