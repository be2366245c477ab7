#!/bin/sh
# Co-DETR (Zong et al., 2023), table 11: each part evaluated, ResNet-50, 12 epochs.
# Row: K = 2, Faster R-CNN head, its own NMS. Published AP 46.7.
# Evaluates what k2_r50_12ep.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../k2_r50_12ep.sh" --output_dir exps/co_detr/table11/k2_faster_rcnn \
    --eval --resume exps/co_detr/k2_r50_12ep/checkpoint.pth --eval_head faster_rcnn "$@"
