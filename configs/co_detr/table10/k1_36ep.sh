#!/bin/sh
# Co-DETR (Zong et al., 2023), table 10: longer schedules, Deformable-DETR, ResNet-50.
# Row: K = 1 (ATSS), 36 epochs. Published AP 46.8.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k1_36ep.sh" --output_dir exps/co_detr/table10/k1_36ep "$@"
