#!/bin/sh
# DINO (Zhang et al., 2023), published models, ResNet-50, 4 scales, 900 queries, 36 epochs.
# Row: DINO-4scale. Published AP 50.9.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/dino_4scale_r50_36ep \
    --epochs 36 --lr_drop 30 "$@"
