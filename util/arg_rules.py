"""Combinations of flags that cannot work, found before anything is built."""

from __future__ import annotations

import argparse

from util.anchor_args import anchor_rules
from util.convert_args import convert_data_rules
from util.data_args import data_check_rules
from util.errors import UserError
from util.export_args import export_rules
from util.idle_flags import class_target, idle_flags
from util.infer_args import infer_rules
from util.picture_args import picture_rules
from util.report_args import report_rules

# Flags that only the one-to-many branch reads, and the values that change nothing.
BRANCH_ONLY = {"one2many_groups": "joint", "one2many_proposals": "rank", "one2many_own": "nothing"}
# Flags that only a learned matcher reads.
SOFT_ONLY = (
    "scg scg_rho scg_switch soft_norm column_competition soft_warmup soft_warmup_share probe_entropy corr_grad "
    "corr_class live_weights extra_cls soft_background soft_extra_layers probe_logits logit_scale_max box_code key_box "
    "probe_per_layer probe_value layer_consistency"
).split()


def check_args(args: argparse.Namespace) -> None:
    """Refuse impossible combinations before anything is built.

    Raises:
        UserError: says which flag to change. All findings are listed at once.
    """
    wrong = [message for broken, message in _rules(args) if broken]
    if wrong:
        raise UserError("this command line cannot work:\n  " + "\n  ".join(wrong))


Rules = list[tuple[bool, str]]  # (broken, what is wrong and the way out)


def _rules(a: argparse.Namespace) -> Rules:
    parts = [_bounds, _model_rules, _run_rules, _data_rules, _hybrid_rules, _head_rules, _matcher_rules, anchor_rules]
    parts += [infer_rules, data_check_rules, report_rules, picture_rules, convert_data_rules, export_rules]
    return [rule for part in parts for rule in part(a)]


def _bounds(a: argparse.Namespace) -> Rules:
    """Return the same for numbers that have a smallest value."""
    positive = "batch_size eval_batch_size grad_accum_steps epochs num_queries_one2one hidden_dim nheads topk".split()
    positive += "enc_layers dec_layers enc_n_points dec_n_points dim_feedforward".split()
    positive += "save_every eval_every max_nonfinite print_freq".split()
    positive += "recipe_batch_size lr_drop max_size lsj_size dist_timeout max_pos_coords roi_samples".split()
    not_negative = "num_workers test_size draw start_epoch save_steps warmup_steps clip_max_norm".split()
    not_negative.append("plot_correspondence")
    not_negative += (
        "lr lr_backbone weight_decay num_queries_one2many k_one2many lambda_one2many lambda1 lambda2 aux_convs".split()
    )
    not_negative += "cls_loss_coef bbox_loss_coef giou_loss_coef corr_loss_coef".split()
    rules = [(getattr(a, n) < 1, f"--{n} {getattr(a, n)}: must be at least 1") for n in positive]
    rules += [(getattr(a, n) < 0, f"--{n} {getattr(a, n)}: must be 0 or more") for n in not_negative]
    for n in ("train_scales", "crop_scales", "crop_range"):
        rules.append((min(getattr(a, n)) < 1, f"--{n} {getattr(a, n)}: sides must be at least 1 pixel"))
    return rules


def _model_rules(a: argparse.Namespace) -> Rules:
    levels = a.num_feature_levels
    return [
        (
            a.two_stage and not a.with_box_refine,
            "--two_stage needs --with_box_refine: add it (proposals are 4-D boxes)",
        ),
        (a.mixed_selection and not a.two_stage, "--mixed_selection needs --two_stage --with_box_refine: add them"),
        (
            a.look_forward_twice and not a.with_box_refine,
            "--look_forward_twice needs --with_box_refine: without refinement there is no new reference to look at",
        ),
        (levels < 1 or levels == 2, f"--num_feature_levels {levels}: use 1 (last map only), 3, 4 or more"),
        (
            a.nheads > 0 and a.hidden_dim % a.nheads != 0,
            f"--hidden_dim {a.hidden_dim} is not a multiple of --nheads {a.nheads}",
        ),
        (a.hidden_dim % 32 != 0, f"--hidden_dim {a.hidden_dim}: must be a multiple of 32 (GroupNorm with 32 groups)"),
        (
            a.set_cost_class == a.set_cost_bbox == a.set_cost_giou == 0,
            "--set_cost_class, --set_cost_bbox and --set_cost_giou are all 0: give at least one a weight",
        ),
    ]


def _run_rules(a: argparse.Namespace) -> Rules:
    """Return the same for what is done with which checkpoint."""
    return [
        (a.eval and not a.resume, "--eval needs --resume CHECKPOINT: without it untrained weights would be evaluated"),
        (
            bool(a.strip) and bool(a.eval or a.analyse or a.resume),
            "--strip CHECKPOINT only writes a file: leave out --eval, --analyse and --resume",
        ),
        (bool(a.analyse) and a.eval, "--analyse and --eval are two things to do with a checkpoint: give one of them"),
        (
            bool(a.analyse) and not (a.resume and a.output_dir),
            "--analyse needs --resume CHECKPOINT, and --output_dir for its results",
        ),
        (
            bool(a.analyse) and a.plot_correspondence > 0,
            "--analyse makes no pictures of correspondences: leave out --plot_correspondence, or use --eval",
        ),
        (
            not a.analyse and bool(a.analyse_label or a.analyse_with),
            "--analyse_label and --analyse_with belong to --analyse NAME: add it",
        ),
        (
            bool(a.resume) and a.resume != "auto" and bool(a.init_from),
            "--resume continues a run and --init_from starts one: give one of them (or --resume auto with --init_from)",
        ),
        (a.resume == "auto" and not a.output_dir, "--resume auto looks into --output_dir: give one"),
        (a.init_class_rows and not a.init_from, "--init_class_rows needs --init_from CHECKPOINT"),
    ]


def _data_rules(a: argparse.Namespace) -> Rules:
    """Return the same for data, training and evaluation."""
    return [
        (bool(a.train_images) != bool(a.train_json), "--train_images and --train_json belong together: give both"),
        (bool(a.val_images) != bool(a.val_json), "--val_images and --val_json belong together: give both"),
        (
            bool(a.train_json) != bool(a.val_json)
            and not (a.eval or a.check_data or a.overfit_batch)
            and not (a.train_json and a.eval_in_training_set),
            "--train_json and --val_json belong together: training is evaluated after every epoch",
        ),
        (a.dilation and a.backbone.startswith("swin"), "--dilation is for ResNets: leave it out with a Swin backbone"),
        (not 0 <= a.dropout < 1, f"--dropout {a.dropout}: must be in [0, 1)"),
        (not 0 <= a.drop_path_rate < 1, f"--drop_path_rate {a.drop_path_rate}: must be in [0, 1)"),
        (
            not (0 <= a.focal_alpha <= 1 or a.focal_alpha == -1),
            f"--focal_alpha {a.focal_alpha}: must be in [0, 1], or -1 for no balance",
        ),
        (min(a.lr_drop_epochs or [1]) < 1, f"--lr_drop_epochs {a.lr_drop_epochs}: count finished epochs, from 1"),
        (not 0 < a.ema_decay < 1, f"--ema_decay {a.ema_decay}: must be between 0 and 1"),
        (a.crop_range[0] > a.crop_range[1], f"--crop_range {a.crop_range}: the smallest side comes first"),
        (
            a.augment != "lsj" and (a.lsj_size != 1024 or a.lsj_scale != [0.1, 2.0]),
            "--lsj_size and --lsj_scale are for large-scale jitter: add --augment lsj",
        ),
        (a.copy_paste < 0, f"--copy_paste {a.copy_paste}: must be 0 or more"),
        (
            a.copy_paste > 0 and a.augment != "lsj",
            "--copy_paste mixes images of one size: add --augment lsj",
        ),
        (
            not 0 < a.lsj_scale[0] <= a.lsj_scale[1],
            f"--lsj_scale {a.lsj_scale}: factors above 0, the smallest comes first",
        ),
        (not 0 <= a.nms_iou <= 1, f"--nms_iou {a.nms_iou}: an IoU, 0 (no NMS) to 1"),
        (not 0 <= a.soft_nms_iou <= 1, f"--soft_nms_iou {a.soft_nms_iou}: an IoU, 0 (no soft-NMS) to 1"),
        (a.nms_iou > 0 and a.soft_nms_iou > 0, "--nms_iou and --soft_nms_iou: give one of them"),
        (a.num_classes is not None and a.num_classes < 1, f"--num_classes {a.num_classes}: must be at least 1"),
    ]


def _head_rules(a: argparse.Namespace) -> Rules:
    """Return the same for auxiliary heads."""
    return [
        (
            bool(a.aux_heads) and a.dilation and a.num_feature_levels > 1,
            "--aux_heads know the strides of --dilation only with --num_feature_levels 1: leave out one of the two",
        ),
        (
            a.lambda1 > 0 and "faster_rcnn" in a.aux_heads and a.roi_samples < 9,
            f"--roi_samples {a.roi_samples}: faster_rcnn makes 9 queries or more of its regions; give at least 9",
        ),
        (
            bool(a.aux_heads) and a.lambda1 == a.lambda2 == 0,
            "--lambda1 0 --lambda2 0: the auxiliary heads teach nothing; leave out --aux_heads",
        ),
        (
            bool(a.eval_head) and a.nms_iou + a.soft_nms_iou > 0,
            "--eval_head: auxiliary heads have NMS of their own; leave out --nms_iou and --soft_nms_iou",
        ),
        (
            bool(a.aux_heads) and a.query_pos == "box" and a.head_embed != "number",
            f"--head_embed {a.head_embed} changes the positions that heads give their queries; with --query_pos box "
            "they give none: leave it out",
        ),
        (bool(a.eval_head) and not a.aux_heads, f"--eval_head {a.eval_head}: needs --aux_heads {a.eval_head}"),
    ]


def _hybrid_rules(a: argparse.Namespace) -> Rules:
    """Return the same for the flags of hybrid matching."""
    queries, repeats = a.num_queries_one2many, a.k_one2many
    branch = queries > 0 and repeats > 0
    changed = [f"--{n} {getattr(a, n)}" for n, plain in BRANCH_ONLY.items() if getattr(a, n) != plain]
    return [
        (
            bool(changed) and not branch,
            f"{', '.join(changed)}: there is no one-to-many branch; give --num_queries_one2many and --k_one2many",
        ),
        (
            a.one2many_groups == "isolated" and branch and queries % repeats != 0,
            f"--num_queries_one2many {queries} cannot be cut into --k_one2many {repeats} groups of equal size: "
            f"{queries - queries % max(repeats, 1)} can",
        ),
        (
            a.one2many_proposals == "own" and not a.two_stage,
            "--one2many_proposals own ranks the proposals of --two_stage: add it",
        ),
        (
            a.one2many_proposals == "own" and a.one2many_own == "encoder",
            "--one2many_own encoder has proposals of its own to rank: leave out --one2many_proposals own",
        ),
        (a.hybrid_k < 1, f"--hybrid_k {a.hybrid_k}: must be at least 1 (1 is one-to-one)"),
        (not 0 <= a.hybrid_rho <= 1, f"--hybrid_rho {a.hybrid_rho}: a share of the epochs, 0 to 1"),
        (
            a.hybrid == "layer" and not a.aux_loss,
            "--hybrid layer teaches layers before the last one: leave out --no_aux_loss",
        ),
        (
            a.hybrid == "layer" and not 0 <= a.hybrid_layers <= a.dec_layers,
            f"--hybrid_layers {a.hybrid_layers}: 0 to --dec_layers {a.dec_layers}",
        ),
    ]


def _matcher_rules(a: argparse.Namespace) -> Rules:
    """Return the same for the flags of matchers; None is a flag that was not given."""
    learned = a.matcher.startswith("soft") or a.enc_matcher == "soft"
    given = [f"--{n} {getattr(a, n)}" for n in SOFT_ONLY if getattr(a, n) is not None]
    shares = {n: getattr(a, n) for n in ("scg_rho", "scg_switch", "soft_warmup_share")}
    layers = a.soft_extra_layers or 0
    return [
        (bool(given) and not learned, f"{', '.join(given)}: nothing is learned here; add --matcher soft"),
        (
            a.plot_correspondence > 0 and not a.matcher.startswith("soft"),
            f"--plot_correspondence {a.plot_correspondence}: --matcher {a.matcher} learns no correspondences; "
            "add --matcher soft",
        ),
        (
            a.plot_correspondence > 0 and not a.output_dir,
            f"--plot_correspondence {a.plot_correspondence} draws into --output_dir: give one",
        ),
        (bool(a.enc_matcher) and not a.two_stage, f"--enc_matcher {a.enc_matcher} is for --two_stage: add it"),
        (
            a.cls_target in ("weight", "pairwise") and not a.matcher.startswith("soft"),
            f"--cls_target {a.cls_target}: --matcher {a.matcher} makes no weights; use hard or quality",
        ),
        (
            bool(a.extra_cls) and class_target(a) not in ("hard", "quality"),
            f"--extra_cls {a.extra_cls}: with weights as targets there is nothing to say; add --cls_target hard",
        ),
        (a.greedy_rounds is not None and a.greedy_rounds < 1, f"--greedy_rounds {a.greedy_rounds}: must be at least 1"),
        *((v is not None and not 0 <= v <= 1, f"--{n} {v}: a share, 0 to 1") for n, v in shares.items()),
        ((a.logit_scale_max or 1) <= 0, f"--logit_scale_max {a.logit_scale_max}: must be above 0"),
        ((a.probe_entropy or 0) < 0, f"--probe_entropy {a.probe_entropy}: must be 0 or more"),
        (
            a.logit_scale_max is not None and _dot_products(a),
            "--logit_scale_max is for --probe_logits cosine: dot products have no scale",
        ),
        (not 0 <= layers <= a.dec_layers, f"--soft_extra_layers {layers}: 0 to --dec_layers {a.dec_layers}"),
        *((True, message) for message in idle_flags(a).values()),
        *_consistency_rules(a, layers),
    ]


def _consistency_rules(a: argparse.Namespace, extra_layers: int) -> Rules:
    last = a.layer_consistency == "last"
    flag = "--layer_consistency last"
    return [
        (last and not a.aux_loss, f"{flag}: without auxiliary losses the last layer is the only one; leave it out"),
        (
            last and extra_layers > 0,
            f"{flag}: with the pairs of the last layer early ones have no extra positives; drop --soft_extra_layers",
        ),
        (
            last and not a.matcher.startswith("soft"),
            f"{flag} is about decoder layers, which --matcher {a.matcher} serves: add --matcher soft",
        ),
    ]


def _dot_products(a: argparse.Namespace) -> bool:
    return (a.probe_logits or ("dot" if a.matcher == "soft-literal" else "cosine")) == "dot"
