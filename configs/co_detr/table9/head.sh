#!/bin/sh
# Co-DETR (Zong et al., 2023), table 9: parts of K = 1, Deformable-DETR, ResNet-50, 12 epochs.
# Row: head, no positive queries. Published AP 41.6.
# Column 36: --epochs 36 --lr_drop 30 (AP 46.2).
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k1_12ep.sh" --output_dir exps/co_detr/table9/head \
    --lambda1 0 "$@"
