#!/bin/sh
# H-DETR (Jia et al., 2023), table 8: one trick after the other, two-stage Deformable-DETR, ResNet-50, 12 epochs.
# Row: base (FFN 1024, dropout 0.1). Published AP 43.3.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../baseline_r50_12ep.sh" --output_dir exps/h_detr/table8/1_base \
    --dim_feedforward 1024 "$@"
