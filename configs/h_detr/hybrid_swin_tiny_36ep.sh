#!/bin/sh
# H-DETR (Jia et al., 2023), table 1 and published models, Swin-T, 300 queries, 36 epochs.
# Row: H-Deformable-DETR: tricks and the hybrid branch (T = 1500, K = 6). Published AP 53.2.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_r50_12ep.sh" --output_dir exps/h_detr/hybrid_swin_tiny_36ep \
    --backbone swin_tiny --epochs 36 --lr_drop 30 "$@"
