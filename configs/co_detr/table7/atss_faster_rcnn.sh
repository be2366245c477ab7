#!/bin/sh
# Co-DETR (Zong et al., 2023), table 7: heads, Deformable-DETR++, ResNet-50, 12 epochs.
# Row: K = 2, ATSS and Faster R-CNN. Published AP 49.5.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../k0_r50_12ep.sh" --output_dir exps/co_detr/table7/atss_faster_rcnn \
    --aux_heads atss faster_rcnn "$@"
