#!/bin/sh
# Co-DETR (Zong et al., 2023), table 10: longer schedules, Deformable-DETR, ResNet-50.
# Row: K = 0, 50 epochs. Published AP 44.5.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k0_36ep.sh" --output_dir exps/co_detr/table10/k0_50ep \
    --epochs 50 --lr_drop 40 "$@"
