#!/bin/sh
# H-DETR (Jia et al., 2023), table 8: one trick after the other, two-stage Deformable-DETR, ResNet-50, 12 epochs.
# Row: + hybrid matching. Published AP 48.7.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../hybrid_r50_12ep.sh" --output_dir exps/h_detr/table8/6_hybrid "$@"
