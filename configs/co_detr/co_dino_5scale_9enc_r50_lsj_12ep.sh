#!/bin/sh
# Co-DETR (Zong et al., 2023), published models, ResNet-50, 5 scales, 900 queries, 12 epochs.
# Row: Co-DINO with large-scale jitter, 9 encoder layers. Published AP 52.6.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/co_dino_5scale_r50_lsj_12ep.sh" --output_dir exps/co_detr/co_dino_5scale_9enc_r50_lsj_12ep \
    --enc_layers 9 "$@"
