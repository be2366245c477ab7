#!/bin/sh
# Co-DETR (Zong et al., 2023), table 2, Deformable-DETR (one stage, no refinement), ResNet-50, 12 epochs.
# Row: K = 0. Published AP 37.1.
# FFN 1024, dropout 0.1 and batch 32 of Deformable-DETR: ours, table 10 has its AP of 44.5 after 50 epochs.
# The files of tables 8 to 10, 12 and 13 are this one and what they add.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../../deformable_detr/r50.sh" --output_dir exps/co_detr/table2/k0_12ep \
    --category_ids contiguous --clip_boxes --no-antialias --epochs 12 --lr_drop 11 "$@"
