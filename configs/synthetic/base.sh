#!/bin/sh
# Deformable DETR at the size of quickstart.sh: drawn shapes, 128 pixels, from scratch, minutes on two CPU cores.
# The other files of this folder are this one and what they add. Total batch 8: one process.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/synthetic/base --dataset_file synthetic \
    --synthetic_train 1000 --synthetic_val 200 --synthetic_size 128 128 --augment flip --test_size 0 \
    --backbone resnet18 --backbone_weights none --backbone_norm train \
    --enc_layers 2 --dec_layers 3 --num_queries_one2one 50 --dropout 0.0 \
    --batch_size 8 --eval_batch_size 8 --recipe_batch_size 8 --lr 5e-4 --lr_backbone 5e-4 --clip_max_norm 1.0 \
    --epochs 4 --lr_drop 3 "$@"
