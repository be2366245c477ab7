#!/bin/sh
# H-DETR (Jia et al., 2023), table 9: repeats K with T = 300 K, ResNet-50 with tricks, 12 epochs.
# Row: K = 2. Published AP 46.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table9/k2 \
    --num_queries_one2many 600 --k_one2many 2 "$@"
