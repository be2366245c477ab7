#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-T, 300 queries, 12 epochs.
# Row: two-stage Deformable-DETR with a wide FFN. Published AP 45.3 and 46.0 (two runs).
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/baseline_r50_12ep.sh" --output_dir exps/h_detr/baseline_swin_tiny_12ep \
    --backbone swin_tiny "$@"
