#!/bin/sh
# H-DETR (Jia et al., 2023), table 7: cost of the hybrid branch, ResNet-50 (Swin-L: add --backbone swin_large).
# Row: T = 1200, K = 6. Published: 279.60 (923.69) GFLOPs, 78 (213) minutes an epoch, 7071 (10558) MB.
# No AP in this table. With tricks: ours, the table does not say.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table7/t1200 \
    --num_queries_one2many 1200 "$@"
