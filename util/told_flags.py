"""Flags that change what a checkpoint means although every tensor fits: a difference from its training is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from util.arg_rules import SOFT_ONLY

# Of the detector and of the pixels it sees: they change its detections.
DETECTION = (
    "pe_temperature pe_half_cell logit_eps dilation augment lsj_size antialias position_embedding category_ids"
).split()
# Of training; all others that differ are about this machine or this call.
TRAINING = (
    "lr lr_backbone lr_linear_proj_mult lr_drop lr_drop_epochs warmup_steps weight_decay epochs batch_size "
    "grad_accum_steps lr_scale clip_max_norm amp use_ema ema_decay dropout train_scales crop_scales crop_range "
    "max_size lsj_scale copy_paste seed set_cost_class set_cost_bbox set_cost_giou cls_loss_coef bbox_loss_coef "
    "giou_loss_coef focal_alpha giou_eps look_forward_twice lambda_one2many k_one2many hybrid_k lambda1 lambda2 "
    "max_pos_coords aux_fill roi_samples dn_number dn_label_noise_ratio dn_box_noise_scale dn_groups matcher "
    "enc_matcher cls_target greedy_rounds corr_loss_coef"
).split()
ON_EVAL = tuple(DETECTION)
ON_RESUME = (*DETECTION, *TRAINING, *SOFT_ONLY)


def changes(stored: Mapping[str, Any], given: Mapping[str, Any], flags: Sequence[str]) -> list[tuple[str, Any, Any]]:
    """Return (flag, value in the file, value now) of all `flags` that both know and that differ."""
    return [(n, stored[n], given[n]) for n in flags if n in stored and n in given and stored[n] != given[n]]


def on_eval(stored: Mapping[str, Any], given: Mapping[str, Any], name: str) -> list[str]:
    """Return sentences about flags with which the checkpoint `name` gives other detections than in its training.

    `augment` counts only where one of both is `lsj`: its images are squares, in evaluation too.
    """
    said = []
    for flag, old, new in changes(stored, given, ON_EVAL):
        if flag == "augment" and "lsj" not in (old, new):
            continue
        if flag == "lsj_size" and given["augment"] != "lsj":
            continue
        said.append(
            f"warning: {name} was trained with {spelt(flag, old)}, now it is {spelt(flag, new)}: its detections will "
            "differ from those of its training"
        )
    return said


def spelt(flag: str, value: Any) -> str:
    """Return a flag with its value as one types it."""
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    words = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([f"--{flag}", *map(str, words)])
