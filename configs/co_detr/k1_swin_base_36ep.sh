#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-B, 300 queries, 36 epochs.
# Row: Co-Deformable-DETR, K = 1 (ATSS). Published AP 57.0.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k1_swin_base_12ep.sh" --output_dir exps/co_detr/k1_swin_base_36ep \
    --drop_path_rate 0.4 --epochs 36 --lr_drop 30 "$@"
