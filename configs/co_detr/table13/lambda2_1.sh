#!/bin/sh
# Co-DETR (Zong et al., 2023), table 13: weights of K = 1, Deformable-DETR, ResNet-50, 36 epochs.
# Row: lambda1 = 1, lambda2 = 1. Published AP 46.1.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k1_36ep.sh" --output_dir exps/co_detr/table13/lambda2_1 \
    --lambda2 1 "$@"
