#!/bin/sh
# H-DETR (Jia et al., 2023), table 7: cost of the hybrid branch, ResNet-50 (Swin-L: add --backbone swin_large).
# Row: T = 1500, K = 6. Published: 282.39 (926.48) GFLOPs, 80 (215) minutes an epoch, 7728 (11203) MB.
# No AP in this table. With tricks: ours, the table does not say.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table7/t1500 "$@"
