#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our ablations of soft, Deformable-DETR, ResNet-50, 20 epochs.
# Row: the correspondence loss trains predictions and queries too (soft: the probe only).
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../variants/soft.sh" --output_dir exps/match_free/ablations/grad_full \
    --corr_grad full "$@"
