#!/bin/sh
# Co-DETR (Zong et al., 2023), table 11: each part evaluated, ResNet-50, 12 epochs.
# Row: K = 0, decoder. Published AP 47.1.
# Evaluates what k0_r50_12ep.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../k0_r50_12ep.sh" --output_dir exps/co_detr/table11/k0_detr \
    --eval --resume exps/co_detr/k0_r50_12ep/checkpoint.pth "$@"
