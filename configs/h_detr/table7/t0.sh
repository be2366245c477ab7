#!/bin/sh
# H-DETR (Jia et al., 2023), table 7: cost of the hybrid branch, ResNet-50 (Swin-L: add --backbone swin_large).
# Row: T = 0, K = 0. Published: 268.19 (912.29) GFLOPs, 65 (202) minutes an epoch, 5480 (8955) MB.
# No AP in this table. With tricks: ours, the table does not say.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../tricks_r50_12ep.sh" --output_dir exps/h_detr/table7/t0 "$@"
