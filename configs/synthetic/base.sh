#!/bin/sh
# Deformable DETR at the size of quickstart.sh: drawn shapes, 128 pixels, from scratch, minutes on two CPU cores.
# The other files of this folder are this one and what they add. Total batch 4: one process.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/synthetic/base --dataset_file synthetic \
    --synthetic_train 1000 --synthetic_val 200 --synthetic_size 128 128 --augment flip --test_size 0 \
    --synthetic_classes 5 --synthetic_objects 1 4 --synthetic_overlap 0.05 --synthetic_texture 0.2 \
    --backbone resnet18 --backbone_weights none --backbone_norm train \
    --enc_layers 2 --dec_layers 3 --num_queries_one2one 30 --hidden_dim 128 --dim_feedforward 512 --dropout 0.0 \
    --batch_size 4 --eval_batch_size 8 --recipe_batch_size 4 \
    --lr 5e-4 --lr_backbone 5e-4 --lr_linear_proj_mult 1.0 --clip_max_norm 1.0 --epochs 5 --lr_drop 4 "$@"
