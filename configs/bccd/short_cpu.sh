#!/bin/sh
# Blood cells (BCCD) from scratch in 6 epochs at 192 pixels: what configs/bccd/finetune_cpu.sh is compared with.
# DATA is the folder with images/ and annotations/instances_{train,val}.json. Total batch 4: one process.
# Not a row of a paper's table.
cd "$(dirname "$0")/../.." || exit
DATA=${DATA:-./data/bccd}
exec ${LAUNCH:-python -u} main.py --output_dir exps/bccd/short_cpu \
    --train_images "$DATA/images" --train_json "$DATA/annotations/instances_train.json" \
    --val_images "$DATA/images" --val_json "$DATA/annotations/instances_val.json" \
    --augment resize --train_scales 176 192 208 --test_size 192 --max_size 288 \
    --backbone resnet18 --backbone_weights none --backbone_norm train \
    --with_box_refine --two_stage --mixed_selection --look_forward_twice \
    --enc_layers 2 --dec_layers 3 --num_queries_one2one 100 --dropout 0.0 --hidden_dim 128 --dim_feedforward 512 \
    --batch_size 4 --eval_batch_size 4 --recipe_batch_size 4 --lr 4e-4 --lr_backbone 4e-4 --lr_linear_proj_mult 1.0 \
    --clip_max_norm 1.0 --epochs 6 --lr_drop 5 "$@"
