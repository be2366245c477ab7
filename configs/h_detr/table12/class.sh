#!/bin/sh
# H-DETR (Jia et al., 2023), table 12: what the one-to-many branch shares, ResNet-50 with tricks, 12 epochs.
# Row: own class heads. Published AP 48.6.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table12/class \
    --one2many_own class "$@"
