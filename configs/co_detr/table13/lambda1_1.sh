#!/bin/sh
# Co-DETR (Zong et al., 2023), table 13: weights of K = 1, Deformable-DETR, ResNet-50, 36 epochs.
# Row: lambda1 = 1, lambda2 = 2. Published AP 46.8.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k1_36ep.sh" --output_dir exps/co_detr/table13/lambda1_1 \
    --lambda1 1 "$@"
