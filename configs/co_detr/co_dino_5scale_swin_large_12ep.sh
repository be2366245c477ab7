#!/bin/sh
# Co-DETR (Zong et al., 2023), table 4 and published models, Swin-L (ImageNet-22k, 384), 900 queries, 12 epochs.
# Row: Co-DINO. Published AP 58.9.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/co_dino_5scale_r50_12ep.sh" --output_dir exps/co_detr/co_dino_5scale_swin_large_12ep \
    --backbone swin_large_window12 --drop_path_rate 0.3 --use_checkpoint --batch_size 1 "$@"
