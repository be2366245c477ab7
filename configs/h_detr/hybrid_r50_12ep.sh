#!/bin/sh
# H-DETR (Jia et al., 2023), table 1 and published models, ResNet-50, 300 queries, 12 epochs.
# Row: H-Deformable-DETR: tricks and the hybrid branch (T = 1500, K = 6). Published AP 48.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/tricks_r50_12ep.sh" --output_dir exps/h_detr/hybrid_r50_12ep \
    --num_queries_one2many 1500 --k_one2many 6 --lambda_one2many 1.0 "$@"
