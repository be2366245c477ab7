#!/bin/sh
# H-DETR (Jia et al., 2023), table 6: three schemes without tricks (wide FFN only), ResNet-50, 12 epochs.
# Row: hybrid branch, n = 300, T = 1500, K = 6. Published AP 45.9.
# Columns 24 and 36: --epochs 24 --lr_drop 20 (AP 47.6), --epochs 36 --lr_drop 30 (AP 48.0).
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../baseline_r50_12ep.sh" --output_dir exps/h_detr/table6/branch \
    --num_queries_one2many 1500 --k_one2many 6 --lambda_one2many 1.0 "$@"
