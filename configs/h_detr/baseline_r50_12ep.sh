#!/bin/sh
# H-DETR (Jia et al., 2023), published models, ResNet-50, 300 queries, 12 epochs.
# Row: two-stage Deformable-DETR with a wide FFN. Published AP 43.7.
# Total batch 16: 8 processes x 2.
# The other files of this folder are this one and what they add.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/h_detr/baseline_r50_12ep \
    --with_box_refine --two_stage --dim_feedforward 2048 --num_queries_one2one 300 \
    --num_queries_one2many 0 --k_one2many 0 \
    --batch_size 2 --recipe_batch_size 16 --epochs 12 --lr_drop 11 "$@"
