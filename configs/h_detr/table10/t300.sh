#!/bin/sh
# H-DETR (Jia et al., 2023), table 10: one-to-many queries T with K = 6, ResNet-50 with tricks, 12 epochs.
# Row: T = 300. Published AP 47.8.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table10/t300 \
    --num_queries_one2many 300 "$@"
