#!/bin/sh
# H-DETR (Jia et al., 2023), table 1 and published models, Swin-L, 300 queries, 36 epochs.
# Row: H-Deformable-DETR: tricks and the hybrid branch (T = 1500, K = 6). Published AP 57.1.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_r50_12ep.sh" --output_dir exps/h_detr/hybrid_swin_large_36ep \
    --backbone swin_large --drop_path_rate 0.5 --epochs 36 --lr_drop 30 "$@"
