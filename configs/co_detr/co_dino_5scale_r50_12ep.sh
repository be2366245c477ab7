#!/bin/sh
# Co-DETR (Zong et al., 2023), table 4 and published models, ResNet-50, 5 scales, 900 queries, 12 epochs.
# Row: Co-DINO, K = 2 (Faster R-CNN, ATSS). Published AP 52.1.
# Total batch 16: 8 processes x 2.
# The other Co-DINO files of this folder are this one and what they add.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/co_detr/co_dino_5scale_r50_12ep \
    --with_box_refine --two_stage --mixed_selection --look_forward_twice --query_pos box --content_init normal \
    --decoder_norm --logit_eps 1e-3 --num_queries_one2one 900 --dim_feedforward 2048 --dropout 0.0 \
    --num_feature_levels 5 --return_interm_indices 0 1 2 3 --pe_temperature 20 --no-pe_half_cell \
    --cls_target quality --focal_alpha -1 --cls_loss_coef 1 \
    --dn_number 100 --dn_groups divided --dn_label_noise_ratio 0.5 --dn_box_noise_scale 1.0 --dn_labelbook_size 79 \
    --aux_heads faster_rcnn atss --lambda1 1 --lambda2 2 --soft_nms_iou 0.8 --clip_boxes --topk 300 \
    --category_ids contiguous --no-antialias --lr 2e-4 --lr_backbone 2e-5 --lr_linear_proj_mult 1.0 \
    --batch_size 2 --recipe_batch_size 16 --epochs 12 --lr_drop 11 "$@"
