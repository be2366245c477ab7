#!/bin/sh
# H-DETR (Jia et al., 2023), table 6: three schemes without tricks (wide FFN only), ResNet-50, 12 epochs.
# Row: Deformable-DETR. Published AP 43.7.
# Columns 24 and 36: --epochs 24 --lr_drop 20 (AP 46.4), --epochs 36 --lr_drop 30 (AP 46.8).
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../baseline_r50_12ep.sh" --output_dir exps/h_detr/table6/baseline "$@"
