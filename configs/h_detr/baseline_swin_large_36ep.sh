#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-L, 300 queries, 36 epochs.
# Row: two-stage Deformable-DETR with a wide FFN. Published AP 53.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/baseline_r50_12ep.sh" --output_dir exps/h_detr/baseline_swin_large_36ep \
    --backbone swin_large --drop_path_rate 0.5 --epochs 36 --lr_drop 30 "$@"
