#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-L, 900 queries, 36 epochs.
# Row: 300 detections kept per image. Published AP 57.6.
# Evaluates what hybrid_swin_large_900q_36ep.sh has trained; --resume FILE takes another file.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_swin_large_900q_36ep.sh" --output_dir exps/h_detr/hybrid_swin_large_900q_36ep_top300 \
    --topk 300 --eval --resume exps/h_detr/hybrid_swin_large_900q_36ep/checkpoint.pth "$@"
