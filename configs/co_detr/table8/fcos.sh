#!/bin/sh
# Co-DETR (Zong et al., 2023), table 8: one head, Deformable-DETR, ResNet-50, 36 epochs.
# Row: FCOS. Published AP 46.5.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k0_36ep.sh" --output_dir exps/co_detr/table8/fcos \
    --aux_heads fcos "$@"
