#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3, Swin-L (ImageNet-22k, 384), 5 scales, 900 queries, 36 epochs.
# Row: DINO-Deformable-DETR, K = 1 (ATSS). Published AP 59.3.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/../../dab_dino/dino_5scale_swin_large_36ep.sh" \
    --output_dir exps/co_detr/table3/dino_k1_swin_large_36ep \
    --category_ids contiguous --clip_boxes --no-antialias --aux_heads atss "$@"
