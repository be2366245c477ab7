#!/bin/sh
# Co-DETR (Zong et al., 2023), table 4 and published models, Swin-L (ImageNet-22k, 384), 900 queries, 12 epochs.
# Row: Co-DINO with large-scale jitter and objects pasted from other images. Published AP 59.3.
# Total batch 16: 16 processes x 1.
exec sh "$(dirname "$0")/co_dino_5scale_swin_large_12ep.sh" \
    --output_dir exps/co_detr/co_dino_5scale_swin_large_lsj_12ep \
    --augment lsj --lsj_size 1280 --copy_paste 100 "$@"
