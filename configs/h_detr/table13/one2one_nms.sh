#!/bin/sh
# H-DETR (Jia et al., 2023), table 13: one-to-many alone and the two branches, ResNet-50 with tricks, 12 epochs.
# Row: one-to-one branch, NMS. Published AP 48.7.
# Evaluates what hybrid_r50_12ep.sh has trained. Columns 24 and 36: --resume FILE of such a run (AP 50.0, 50.0).
# NMS at IoU 0.7: ours, the paper does not say.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/one2one.sh" --output_dir exps/h_detr/table13/one2one_nms \
    --nms_iou 0.7 "$@"
