#!/bin/sh
# H-DETR (Jia et al., 2023) on DINO-4scale: denoising and the hybrid branch together, ResNet-50, 12 epochs.
# Row: our combination (T = 1500, K = 6); no published AP.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/h_dino_4scale_r50_12ep \
    --num_queries_one2many 1500 --k_one2many 6 --lambda_one2many 1.0 "$@"
