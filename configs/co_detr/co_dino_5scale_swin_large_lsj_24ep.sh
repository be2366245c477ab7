#!/bin/sh
# Co-DETR (Zong et al., 2023), table 4 and published models, Swin-L (ImageNet-22k, 384), 900 queries, 24 epochs.
# Row: Co-DINO with large-scale jitter. Published AP 60.4.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/co_dino_5scale_swin_large_lsj_12ep.sh" \
    --output_dir exps/co_detr/co_dino_5scale_swin_large_lsj_24ep \
    --drop_path_rate 0.5 --epochs 24 --lr_drop 20 "$@"
