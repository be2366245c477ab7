#!/bin/sh
# Deformable DETR (Zhu et al., 2021), published results, ResNet-50, 50 epochs.
# Row: Deformable DETR, four levels, no variant. Published AP 44.5.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
cd "$(dirname "$0")/../.." || exit
exec ${LAUNCH:-python -u} main.py --output_dir exps/deformable_detr/r50 \
    --batch_size 2 --recipe_batch_size 32 --epochs 50 --lr_drop 40 "$@"
