#!/bin/sh
# H-DETR (Jia et al., 2023), published results, ResNet-50, 300 queries, 36 epochs.
# Row: Deformable-DETR baseline, two-stage. Published AP 46.8.
# Total batch 16: 8 processes x 2.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/h_detr/baseline_r50_36ep \
    --with_box_refine --two_stage --dim_feedforward 2048 --num_queries_one2one 300 \
    --num_queries_one2many 0 --k_one2many 0 \
    --batch_size 2 --recipe_batch_size 16 --epochs 36 --lr_drop 30 "$@"
