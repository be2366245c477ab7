#!/bin/sh
# H-DETR (Jia et al., 2023), published models, Swin-T, 300 queries, 36 epochs.
# Row: H-Deformable-DETR with weight decay 0.05 instead of 1e-4. Published AP 53.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/hybrid_swin_tiny_36ep.sh" --output_dir exps/h_detr/hybrid_swin_tiny_36ep_decay0.05 \
    --weight_decay 0.05 "$@"
