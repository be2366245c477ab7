#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-L, 900 queries, 36 epochs.
# Row: Co-Deformable-DETR, K = 2 (ATSS, Faster R-CNN). Published AP 58.3.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k2_swin_large_12ep.sh" --output_dir exps/co_detr/k2_swin_large_900q_36ep \
    --num_queries_one2one 900 --drop_path_rate 0.6 --epochs 36 --lr_drop 30 "$@"
