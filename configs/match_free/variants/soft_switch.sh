#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our variants, Deformable-DETR, ResNet-50, 20 epochs.
# Row: soft, one query for every object in the last 30 % of training.
# The measures of evaluations (distinct, agree ...) are those of the rounds at its end from the first epoch on.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/soft.sh" --output_dir exps/match_free/variants/soft_switch \
    --scg_switch 0.7 "$@"
