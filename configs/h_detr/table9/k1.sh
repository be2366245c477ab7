#!/bin/sh
# H-DETR (Jia et al., 2023), table 9: repeats K with T = 300 K, ResNet-50 with tricks, 12 epochs.
# Row: K = 1. Published AP 46.4.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table9/k1 \
    --num_queries_one2many 300 --k_one2many 1 "$@"
