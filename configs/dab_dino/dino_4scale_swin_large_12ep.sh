#!/bin/sh
# DINO (Zhang et al., 2023), published models, Swin-L (ImageNet-22k, 384), 4 scales, 900 queries, 12 epochs.
# Row: DINO-4scale. Published AP 56.8.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/dino_4scale_swin_large_12ep \
    --backbone swin_large_window12 --drop_path_rate 0.2 --use_checkpoint --batch_size 1 "$@"
