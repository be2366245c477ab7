#!/bin/sh
# DINO (Zhang et al., 2023), published models, Swin-L (ImageNet-22k, 384), 5 scales, 900 queries, 36 epochs.
# Row: DINO-5scale. Published AP 58.5.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/dino_5scale_swin_large_12ep.sh" --output_dir exps/dab_dino/dino_5scale_swin_large_36ep \
    --epochs 36 --lr_drop 30 "$@"
