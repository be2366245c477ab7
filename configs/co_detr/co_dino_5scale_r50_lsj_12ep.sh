#!/bin/sh
# Co-DETR (Zong et al., 2023), table 4 and published models, ResNet-50, 5 scales, 900 queries, 12 epochs.
# Row: Co-DINO with large-scale jitter and objects pasted from other images. Published AP 52.1.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/co_dino_5scale_r50_12ep.sh" --output_dir exps/co_detr/co_dino_5scale_r50_lsj_12ep \
    --augment lsj --lsj_size 1024 --copy_paste 100 "$@"
