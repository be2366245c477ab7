#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), weight of the correspondence loss, Deformable-DETR, ResNet-50, 20 epochs.
# Row: weight 1. The best one on record.
# On record is only that 1 is better than 0.5 and 2, no numbers.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../match_free_r50_20ep.sh" --output_dir exps/match_free/table_weight/corr1 \
    --corr_loss_coef 1 "$@"
