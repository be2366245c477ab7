#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-T, 300 queries, 36 epochs.
# Row: Co-Deformable-DETR, K = 2 (ATSS, Faster R-CNN). Published AP 54.1.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k2_swin_tiny_12ep.sh" --output_dir exps/co_detr/k2_swin_tiny_36ep \
    --drop_path_rate 0.3 --epochs 36 --lr_drop 30 "$@"
