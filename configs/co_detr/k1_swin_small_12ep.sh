#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-S, 300 queries, 12 epochs.
# Row: Co-Deformable-DETR, K = 1 (ATSS). Published AP 53.4.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k1_r50_12ep.sh" --output_dir exps/co_detr/k1_swin_small_12ep \
    --backbone swin_small --drop_path_rate 0.2 --weight_decay 0.05 "$@"
