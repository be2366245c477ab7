#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-B, 300 queries, 12 epochs.
# Row: Deformable-DETR++, K = 0. Published AP 54.0.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k0_r50_12ep.sh" --output_dir exps/co_detr/k0_swin_base_12ep \
    --backbone swin_base_window12 --drop_path_rate 0.2 --weight_decay 0.05 "$@"
