#!/bin/sh
# DINO (Zhang et al., 2023), published models, ResNet-50, 4 scales, 900 queries, 12 epochs.
# Row: DINO-4scale. Published AP 49.0.
# Total batch 16: 8 processes x 2.
# The other DINO files of this folder are this one and what they add.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/dab_dino/dino_4scale_r50_12ep \
    --with_box_refine --two_stage --mixed_selection --look_forward_twice --query_pos box \
    --decoder_norm --share_heads --dim_feedforward 2048 --dropout 0.0 --num_queries_one2one 900 --topk 300 \
    --pe_temperature 20 --no-pe_half_cell --logit_eps 1e-3 --giou_eps 1e-6 --cls_loss_coef 1 \
    --dn_number 100 --dn_label_noise_ratio 0.5 --dn_box_noise_scale 1.0 \
    --lr 1e-4 --lr_backbone 1e-5 --lr_linear_proj_mult 1.0 \
    --batch_size 2 --recipe_batch_size 16 --epochs 12 --lr_drop 11 "$@"
