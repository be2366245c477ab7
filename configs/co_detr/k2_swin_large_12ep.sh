#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3 and published models, Swin-L, 300 queries, 12 epochs.
# Row: Co-Deformable-DETR, K = 2 (ATSS, Faster R-CNN). Published AP 56.9.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k2_r50_12ep.sh" --output_dir exps/co_detr/k2_swin_large_12ep \
    --backbone swin_large_window12 --drop_path_rate 0.3 --weight_decay 0.05 "$@"
