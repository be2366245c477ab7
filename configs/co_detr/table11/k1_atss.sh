#!/bin/sh
# Co-DETR (Zong et al., 2023), table 11: each part evaluated, ResNet-50, 12 epochs.
# Row: K = 1, ATSS head, its own NMS. Published AP 47.4.
# Evaluates what k1_r50_12ep.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../k1_r50_12ep.sh" --output_dir exps/co_detr/table11/k1_atss \
    --eval --resume exps/co_detr/k1_r50_12ep/checkpoint.pth --eval_head atss "$@"
