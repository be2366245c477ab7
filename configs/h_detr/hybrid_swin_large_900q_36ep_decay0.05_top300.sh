#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-L, 900 queries, 36 epochs, weight decay 0.05.
# Row: 300 detections kept per image. Published AP 57.9.
# Evaluates what hybrid_swin_large_900q_36ep_decay0.05.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_swin_large_900q_36ep_decay0.05.sh" \
    --output_dir exps/h_detr/hybrid_swin_large_900q_36ep_decay0.05_top300 \
    --topk 300 --eval --resume exps/h_detr/hybrid_swin_large_900q_36ep_decay0.05/checkpoint.pth "$@"
