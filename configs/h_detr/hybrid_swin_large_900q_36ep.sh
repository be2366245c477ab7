#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-L, 900 queries, 36 epochs.
# Row: H-Deformable-DETR: tricks and the hybrid branch (T = 1500, K = 6). Published AP 57.4.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_r50_12ep.sh" --output_dir exps/h_detr/hybrid_swin_large_900q_36ep \
    --backbone swin_large --num_queries_one2one 900 --drop_path_rate 0.5 --epochs 36 --lr_drop 30 "$@"
