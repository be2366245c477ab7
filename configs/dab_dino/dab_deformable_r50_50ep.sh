#!/bin/sh
# DAB-DETR (Liu et al., 2022), DAB-Deformable-DETR, ResNet-50, 300 queries, 50 epochs.
# Row: DAB-Deformable-DETR. Published AP 48.7.
# Total batch 16: 8 processes x 2.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/dab_dino/dab_deformable_r50_50ep \
    --with_box_refine --query_pos box --query_scale --dim_feedforward 2048 --dropout 0.0 --num_queries_one2one 300 \
    --logit_eps 1e-3 --giou_eps 1e-6 --cls_loss_coef 1 \
    --lr 1e-4 --lr_backbone 1e-5 --lr_linear_proj_mult 1.0 \
    --batch_size 2 --recipe_batch_size 16 --epochs 50 --lr_drop 40 "$@"
