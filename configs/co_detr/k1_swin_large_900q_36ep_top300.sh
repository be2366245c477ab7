#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, Swin-L, 900 queries, 36 epochs.
# Row: K = 1 (ATSS), 300 detections kept per image. Published AP 58.3.
# Evaluates what k1_swin_large_900q_36ep.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k1_swin_large_900q_36ep.sh" --output_dir exps/co_detr/k1_swin_large_900q_36ep_top300 \
    --topk 300 --eval --resume exps/co_detr/k1_swin_large_900q_36ep/checkpoint.pth "$@"
