#!/bin/sh
# DINO (Zhang et al., 2023), published models, ResNet-50, 4 scales, 900 queries, 24 epochs.
# Row: DINO-4scale. Published AP 50.4.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/dino_4scale_r50_24ep \
    --epochs 24 --lr_drop 20 "$@"
