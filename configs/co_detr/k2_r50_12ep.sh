#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3 and published models, ResNet-50, 300 queries, 12 epochs.
# Row: Co-Deformable-DETR, K = 2 (ATSS, Faster R-CNN). Published AP 49.5.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k0_r50_12ep.sh" --output_dir exps/co_detr/k2_r50_12ep \
    --aux_heads atss faster_rcnn "$@"
