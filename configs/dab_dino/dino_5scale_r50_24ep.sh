#!/bin/sh
# DINO (Zhang et al., 2023), published models, ResNet-50, 5 scales, 900 queries, 24 epochs.
# Row: DINO-5scale. Published AP 51.3.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/dino_5scale_r50_12ep.sh" --output_dir exps/dab_dino/dino_5scale_r50_24ep \
    --epochs 24 --lr_drop 20 "$@"
