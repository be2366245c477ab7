#!/bin/sh
# Co-DETR (Zong et al., 2023), early model list, H-Deformable-DETR, ResNet-50, 300 queries, 12 epochs.
# Row: hybrid branch (T = 1500, K = 6) and K = 2 (ATSS, Faster R-CNN). Published AP 49.7.
# K = 0 is h_detr/hybrid_r50_12ep.sh, in this list with AP 48.4.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../h_detr/hybrid_r50_12ep.sh" --output_dir exps/co_detr/co_h_k2_r50_12ep \
    --category_ids contiguous --clip_boxes --no-antialias --aux_heads atss faster_rcnn "$@"
