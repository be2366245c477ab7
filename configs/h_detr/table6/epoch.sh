#!/bin/sh
# H-DETR (Jia et al., 2023), table 6: three schemes without tricks (wide FFN only), ResNet-50, 12 epochs.
# Row: hybrid epoch, M = 1800, K = 10, rho = 2/3 (the default). Published AP 45.5.
# Columns 24 and 36: --epochs 24 --lr_drop 20 (AP 47.0), --epochs 36 --lr_drop 30 (AP 47.9).
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../baseline_r50_12ep.sh" --output_dir exps/h_detr/table6/epoch \
    --num_queries_one2one 1800 --hybrid epoch --hybrid_k 10 "$@"
