#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our ablations of soft, Deformable-DETR, ResNet-50, 20 epochs.
# Row: Hungarian pairs as first help (soft: distance of boxes).
# The solver runs in the first tenth of training: not free of matching.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../variants/soft.sh" --output_dir exps/match_free/ablations/warmup_teacher \
    --soft_warmup teacher "$@"
