#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3, ResNet-50, 300 queries, 12 epochs.
# Row: Co-Deformable-DETR, K = 1 (ATSS). Published AP 48.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k0_r50_12ep.sh" --output_dir exps/co_detr/k1_r50_12ep \
    --aux_heads atss "$@"
