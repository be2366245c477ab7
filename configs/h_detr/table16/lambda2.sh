#!/bin/sh
# H-DETR (Jia et al., 2023), table 16: weight lambda of the one-to-many losses, ResNet-50 with tricks, 12 epochs.
# Row: lambda = 2, K = 6, T = 1500. Published AP 48.5.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table16/lambda2 \
    --lambda_one2many 2 "$@"
