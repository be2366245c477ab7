#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our ablations of soft, Deformable-DETR, ResNet-50, 20 epochs.
# Row: class target IoU (soft: the weight of the pair).
# Independent of the matcher: to be fair, run baseline_r50_20ep.sh with --cls_target quality too.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../variants/soft.sh" --output_dir exps/match_free/ablations/target_quality \
    --cls_target quality "$@"
