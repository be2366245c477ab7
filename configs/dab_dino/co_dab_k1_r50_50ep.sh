#!/bin/sh
# Co-DETR (Zong et al., 2023) on DAB-Deformable-DETR: K = 1 (ATSS), ResNet-50, 50 epochs.
# Row: our combination; no published AP.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/dab_deformable_r50_50ep.sh" --output_dir exps/dab_dino/co_dab_k1_r50_50ep \
    --aux_heads atss "$@"
