#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3, ResNet-50, 5 scales, 900 queries, 12 epochs.
# Row: DINO-Deformable-DETR, K = 2 (ATSS, Faster R-CNN). Published AP 51.2.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/../../dab_dino/dino_5scale_r50_12ep.sh" --output_dir exps/co_detr/table3/dino_k2_r50_12ep \
    --category_ids contiguous --clip_boxes --no-antialias --aux_heads atss faster_rcnn "$@"
