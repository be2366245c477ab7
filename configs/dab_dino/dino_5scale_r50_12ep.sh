#!/bin/sh
# DINO (Zhang et al., 2023), published models, ResNet-50, 5 scales, 900 queries, 12 epochs.
# Row: DINO-5scale. Published AP 49.4.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/dino_5scale_r50_12ep \
    --num_feature_levels 5 --return_interm_indices 0 1 2 3 --batch_size 1 "$@"
