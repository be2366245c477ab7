#!/bin/sh
# Co-DETR (Zong et al., 2023), table 3, ResNet-50, 300 queries, 12 epochs.
# Row: Deformable-DETR++: H-DETR's baseline with tricks, K = 0. Published AP 47.1.
# Classes 0..79, boxes cut at the image border, no antialiasing: as in published files. Most of this folder is this and more.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../h_detr/tricks_r50_12ep.sh" --output_dir exps/co_detr/k0_r50_12ep \
    --category_ids contiguous --clip_boxes --no-antialias "$@"
