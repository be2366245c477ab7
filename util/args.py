"""Every flag of `main.py`, in argument groups whose order is the reading order of `--help`.

Names and defaults are those of the Deformable-DETR family. A flag says its unit, its default and, where it stands for
an idea of a paper, the section. `args` ends at the `build_*` functions: no class takes it.
"""

from __future__ import annotations

import argparse

from util.anchor_args import add_anchors, add_denoising
from util.convert_args import add_convert_data
from util.data_args import add_data_checks
from util.export_args import add_export
from util.infer_args import add_infer
from util.parser import HelpFormatter, Parser
from util.picture_args import add_pictures
from util.report_args import add_reports
from util.scheme_args import add_auxiliary, add_hybrid, add_losses, add_queries, add_soft
from util.speed_args import add_speed

SWITCH = argparse.BooleanOptionalAction


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of `main.py`, with `--help`."""
    parser = Parser(
        "main.py",
        usage="python main.py [flags]          python main.py --help lists them, configs/ holds presets",
        description="AssignDETR. Train and evaluate Deformable-DETR detectors; every way to teach them is a switch.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,  # a misspelt flag is an error, never another flag
    )
    for add in (
        _add_run,
        _add_data,
        add_convert_data,
        _add_synthetic,
        add_data_checks,
        _add_backbone,
        _add_transformer,
        add_queries,
        add_anchors,
        add_hybrid,
        add_denoising,
        add_soft,
        add_auxiliary,
        add_losses,
        _add_optimisation,
        add_speed,
        _add_distributed,
        _add_logging,
        add_infer,
        add_reports,
        add_pictures,
        add_export,
    ):
        add(parser)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", help="folder for checkpoints, logs and results; empty: save nothing")
    group.add_argument("--device", default="auto", help="auto (cuda if there is one, else cpu), cuda, cuda:N, cpu, mps")
    group.add_argument("--seed", default=42, type=int, help="seed of weights, image order, augmentation and dropout")
    group.add_argument("--eval", action="store_true", help="evaluate --resume on the validation images and stop")
    group.add_argument(
        "--analyse",
        default="",
        choices=["", "discriminability", "conflict", "attention"],
        help="analyse --resume on the validation images and stop: discriminability of encoder and decoder, conflict "
        "of heads (Co-DETR, section 5 and supplement); attention: pictures of the sampling points (Deformable-DETR, "
        "fig. 6)",
    )
    group.add_argument("--analyse_label", default="", help="name in its curves; empty: the folder of --resume")
    group.add_argument(
        "--analyse_with", nargs="+", default=[], help=".json results of other checkpoints to draw in the same picture"
    )
    group.add_argument(
        "--strip",
        default="",
        metavar="CHECKPOINT",
        help="write CHECKPOINT_inference.pth without optimiser and parts that only training needs, and stop",
    )
    group.add_argument(
        "--resume",
        default="",
        help="checkpoint (file or https) to continue exactly; auto: OUTPUT_DIR/checkpoint.pth if there is one",
    )
    group.add_argument(
        "--init_from",
        "--pretrain_model_path",
        default="",
        help="take only the weights that fit from this checkpoint and list the others; optimiser and epoch start anew",
    )
    group.add_argument(
        "--init_class_rows",
        action=SWITCH,
        default=False,
        help="with --init_from: copy the rows of the class heads whose class has the same name in both models",
    )
    group.add_argument("--start_epoch", default=0, type=int, help="first epoch when nothing is resumed, from 0")
    group.add_argument(
        "--deterministic", action=SWITCH, default=False, help="ask torch for deterministic kernels (slower; warns)"
    )
    group.add_argument(
        "--ops_backend",
        default="auto",
        choices=["auto", "reference", "cpu", "cuda"],
        help="implementation of deformable attention; auto takes the fastest that works here",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_file", default="coco", choices=["coco", "synthetic"], help="kind of data set")
    group.add_argument(
        "--coco_path", default="./data/coco", help="folder with train2017/, val2017/ and annotations/ of COCO"
    )
    for part in ("train", "val"):
        group.add_argument(f"--{part}_images", default="", help=f"any other image folder for the {part} set")
        group.add_argument(f"--{part}_json", default="", help=f"its COCO-format annotation file ({part} set)")
    group.add_argument(
        "--category_ids",
        default="auto",
        choices=["auto", "contiguous", "raw"],
        help="class index of a category: contiguous 0..K-1 in the order of the ids; raw: the id itself, as in "
        "published COCO weights (91 slots); auto: raw for the 80 categories of COCO, contiguous for everything else",
    )
    group.add_argument(
        "--num_classes", default=None, type=int, help="number of class outputs; not given: read from the annotations"
    )
    group.add_argument("--cache_mode", action=SWITCH, default=False, help="keep the encoded images in memory")
    group.add_argument("--num_workers", default=2, type=int, help="loader processes per training process")
    group.add_argument(
        "--augment",
        default="detr",
        choices=["detr", "resize", "flip", "none", "lsj"],
        help="training augmentation: detr = flip and (resize or resize-crop-resize); resize = flip and resize; "
        "flip = only the flip, at the evaluation size; none; lsj = large-scale jitter on squares, in evaluation too "
        "(Co-DINO): sizes are those of --lsj_size only",
    )
    group.add_argument("--lsj_size", default=1024, type=int, help="side of the square of --augment lsj, pixels")
    group.add_argument(
        "--lsj_scale",
        nargs=2,
        type=float,
        default=[0.1, 2.0],
        help="smallest and largest factor of --augment lsj; 1: the image just fits into the square",
    )
    group.add_argument(
        "--copy_paste",
        default=0,
        type=int,
        help="after --augment lsj, paste up to so many objects of another image along their masks (Co-DINO: 100)",
    )
    group.add_argument(
        "--train_scales", nargs="+", type=int, default=list(range(480, 801, 32)), help="shorter sides drawn, pixels"
    )
    group.add_argument(
        "--crop_scales", nargs="+", type=int, default=[400, 500, 600], help="shorter sides before a crop"
    )
    group.add_argument("--crop_range", nargs=2, type=int, default=[384, 600], help="smallest and largest crop side")
    group.add_argument("--test_size", default=800, type=int, help="shorter side in evaluation, pixels; 0: no resizing")
    group.add_argument("--max_size", default=1333, type=int, help="largest longer side, pixels")
    group.add_argument(
        "--antialias",
        action=SWITCH,
        default=True,
        help="shrink images with PIL's antialiased filter (DETR); --no-antialias: plain bilinear (Co-DETR)",
    )
    _add_evaluation(group)


def _add_evaluation(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--eval_batch_size", default=1, type=int, help="images per process in evaluation")
    group.add_argument(
        "--eval_in_training_set", action=SWITCH, default=False, help="evaluate on the training images (H-DETR)"
    )
    group.add_argument("--eval_loss", action=SWITCH, default=True, help="compute the losses in evaluation too")
    group.add_argument("--topk", default=100, type=int, help="detections kept per image")
    group.add_argument(
        "--evaluator",
        default="auto",
        choices=["auto", "pycocotools", "faster-coco-eval", "hotcoco"],
        help="package that computes AP, all give the same numbers; auto: the fastest that is installed, of hotcoco, "
        "faster-coco-eval and pycocotools (pip install hotcoco for the fastest)",
    )
    group.add_argument("--nms_iou", default=0.0, type=float, help="IoU above which NMS drops a detection; 0: no NMS")
    group.add_argument(
        "--soft_nms_iou", default=0.0, type=float, help="IoU above which soft-NMS lowers a score (Co-DINO: 0.8); 0: off"
    )
    group.add_argument("--clip_boxes", action=SWITCH, default=False, help="cut boxes at the image border (Co-DETR)")
    group.add_argument("--eval_group", default="one2one", help="evaluate this group of queries, as one2many")


def _add_synthetic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("synthetic data (--dataset_file synthetic)")
    group.add_argument("--synthetic_train", default=1000, type=int, help="number of training images")
    group.add_argument("--synthetic_val", default=200, type=int, help="number of held-out images")
    group.add_argument("--synthetic_size", nargs=2, type=int, default=[128, 128], help="height and width, pixels")
    group.add_argument("--synthetic_classes", default=6, type=int, help="number of shape classes")
    group.add_argument("--synthetic_objects", nargs=2, type=int, default=[1, 5], help="fewest and most per image")
    group.add_argument(
        "--synthetic_object_size",
        nargs=2,
        type=float,
        default=[0.15, 0.4],
        help="smallest and largest side of an object, as a share of the shorter image side",
    )
    group.add_argument("--synthetic_overlap", default=0.2, type=float, help="largest box IoU allowed between objects")
    group.add_argument("--synthetic_texture", default=0.3, type=float, help="strength of the background texture, 0..1")


def _add_backbone(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("backbone")
    group.add_argument("--backbone", default="resnet50", help="resnet18/34/50/101, swin_tiny, swin_small, ...")
    group.add_argument(
        "--backbone_weights",
        default="default",
        help="default (download ImageNet weights), none, a file, or for Swin a timm name, for example "
        "swin_tiny_patch4_window7_224.ms_in22k",
    )
    group.add_argument(
        "--pretrained_backbone_path",
        default="",
        help="the same as --backbone_weights PATH or NAME: a published, timm's or safetensors file of Swin weights",
    )
    group.add_argument(
        "--backbone_norm",
        default="frozen",
        choices=["frozen", "train"],
        help="batch norm of a ResNet; train is for training from scratch",
    )
    group.add_argument("--dilation", action=SWITCH, default=False, help="last stage with dilation, not stride (DC5)")
    group.add_argument("--drop_path_rate", default=0.2, type=float, help="stochastic depth of Swin")
    group.add_argument("--position_embedding", default="sine", choices=["sine", "learned"], help="of image features")
    group.add_argument("--position_embedding_scale", default=6.283185307179586, type=float, help="2 pi; of the sine")
    group.add_argument("--pe_temperature", default=10000.0, type=float, help="of the sine (DINO: 20)")
    group.add_argument(
        "--pe_half_cell", action=SWITCH, default=True, help="the sine starts in the middle of a cell (DINO: off)"
    )
    group.add_argument(
        "--num_feature_levels", default=4, type=int, help="1, or 3 backbone maps and extra stride-2 levels"
    )
    group.add_argument(
        "--return_interm_indices",
        nargs="+",
        type=int,
        help="backbone maps that are used, 0 (stride 4) to 3 (stride 32); 5 levels of DINO: 0 1 2 3 "
        "(default: 1 2 3, with one level 3)",
    )


def _add_transformer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("transformer")
    group.add_argument("--enc_layers", default=6, type=int, help="encoder layers")
    group.add_argument("--dec_layers", default=6, type=int, help="decoder layers")
    group.add_argument("--dim_feedforward", default=1024, type=int, help="width of the feed-forward (2048 in H-DETR)")
    group.add_argument("--hidden_dim", default=256, type=int, help="width of the transformer")
    group.add_argument("--dropout", default=0.1, type=float, help="dropout in the transformer (0 in H-DETR's tricks)")
    group.add_argument("--nheads", default=8, type=int, help="attention heads")
    group.add_argument("--enc_n_points", default=4, type=int, help="sampling points per head and level, encoder")
    group.add_argument("--dec_n_points", default=4, type=int, help="sampling points per head and level, decoder")
    group.add_argument(
        "--use_checkpoint", action=SWITCH, default=False, help="activation checkpointing: less memory, slower"
    )


def _add_optimisation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", default=2e-4, type=float, help="rate of everything not named below")
    group.add_argument("--lr_backbone_names", default=["backbone.0"], nargs="+", help="parts of parameter names")
    group.add_argument("--lr_backbone", default=2e-5, type=float, help="their rate; 0 freezes the backbone")
    group.add_argument(
        "--lr_linear_proj_names",
        default=["reference_points", "sampling_offsets"],
        nargs="+",
        help="parts of parameter names",
    )
    group.add_argument("--lr_linear_proj_mult", default=0.1, type=float, help="their rate, as a factor of --lr")
    group.add_argument("--batch_size", default=2, type=int, help="images per process and step")
    group.add_argument("--grad_accum_steps", default=1, type=int, help="batches per optimiser step")
    group.add_argument(
        "--recipe_batch_size", default=32, type=int, help="total batch the recipe assumes; a difference is warned of"
    )
    group.add_argument(
        "--lr_scale",
        default="none",
        choices=["none", "sqrt", "linear"],
        help="scale all rates by the effective batch over the recipe's",
    )
    group.add_argument("--weight_decay", default=1e-4, type=float, help="of all parameters, norms and biases too")
    group.add_argument("--epochs", default=50, type=int, help="number of epochs")
    group.add_argument("--lr_drop", default=40, type=int, help="rates times 0.1 every so many epochs")
    group.add_argument(
        "--lr_drop_epochs", default=None, nargs="+", type=int, help="rates times 0.1 after each of these epochs instead"
    )
    group.add_argument("--warmup_steps", default=0, type=int, help="optimiser steps of linear warm-up")
    group.add_argument("--clip_max_norm", default=0.1, type=float, help="largest gradient norm; 0: no clipping")
    group.add_argument("--sgd", action=SWITCH, default=False, help="SGD with momentum 0.9 in place of AdamW")
    group.add_argument(
        "--amp",
        default="off",
        nargs="?",
        const="bf16",
        choices=["off", "fp16", "bf16"],
        help="mixed precision; bare --amp means bf16",
    )
    group.add_argument("--use_fp16", dest="amp", action="store_const", const="fp16", help="the same as --amp fp16")
    group.add_argument("--use_ema", action=SWITCH, default=False, help="keep and evaluate an average of the weights")
    group.add_argument("--ema_decay", default=0.9997, type=float, help="decay of that average per step")
    group.add_argument(
        "--freeze",
        default=[],
        nargs="+",
        help="beginnings of parameter names that are not trained, for example backbone",
    )
    group.add_argument(
        "--max_nonfinite",
        default=20,
        type=int,
        help="stop after so many non-finite losses in a row, on a GPU a few steps later; each skips its step",
    )


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("distributed")
    # torch.distributed.launch passes the dashed form, older ones the other; the environment wins over both.
    group.add_argument(
        "--local-rank", "--local_rank", dest="local_rank", type=int, default=None, help=argparse.SUPPRESS
    )
    for name in ("--world_size", "--rank"):
        group.add_argument(name, type=int, default=None, help=argparse.SUPPRESS)
    group.add_argument("--dist_url", default="env://", help=argparse.SUPPRESS)
    group.add_argument("--dist_timeout", default=30, type=int, help="minutes until a hanging collective is an error")
    group.add_argument(
        "--find_unused_params", action=SWITCH, default=False, help="an escape for forks; ours never needs it"
    )


def _add_logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("saving and logging")
    group.add_argument("--print_freq", default=10, type=int, help="steps between progress lines")
    group.add_argument(
        "--save_every", default=5, type=int, help="keep checkpointNNNN.pth every so many epochs, and before a drop"
    )
    group.add_argument(
        "--save_steps", default=0, type=int, help="also save checkpoint.pth every so many steps; 0: at epoch ends only"
    )
    group.add_argument("--eval_every", default=1, type=int, help="epochs between evaluations; the last is always done")
    group.add_argument("--draw", default=8, type=int, help="evaluated images drawn with boxes into OUTPUT_DIR/pictures")
    group.add_argument("--tensorboard", action=SWITCH, default=True, help="write TensorBoard files if it is installed")
