#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3 and published models, Swin-L, 300 queries, 12 epochs.
# Row: Deformable-DETR++, K = 0. Published AP 55.2.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k0_r50_12ep.sh" --output_dir exps/co_detr/k0_swin_large_12ep \
    --backbone swin_large_window12 --drop_path_rate 0.3 --weight_decay 0.05 "$@"
