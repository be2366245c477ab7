#!/bin/sh
# Fine-tuning on any data set in COCO's format, with one GPU or the CPU: two-stage Deformable DETR, ResNet-50.
#   DATA=FOLDER configs/finetune/custom.sh --init_from FILE.pth --init_class_rows
# DATA is the folder with images/ and annotations/instances_{train,val}.json; TRAIN_IMAGES, TRAIN_JSON, VAL_IMAGES and
# VAL_JSON replace single paths. FILE is the published file of configs/deformable_detr/two_stage.sh; a file of another
# model needs the flags of its preset after these. Total batch 8: one process x 2 x 4 accumulated.
# Not a row of a paper's table.
cd "$(dirname "$0")/../.." || exit
DATA=${DATA:-./data/custom}
exec ${LAUNCH:-python -u} main.py --output_dir exps/finetune/custom \
    --train_images "${TRAIN_IMAGES:-$DATA/images}" \
    --train_json "${TRAIN_JSON:-$DATA/annotations/instances_train.json}" \
    --val_images "${VAL_IMAGES:-$DATA/images}" --val_json "${VAL_JSON:-$DATA/annotations/instances_val.json}" \
    --with_box_refine --two_stage \
    --batch_size 2 --grad_accum_steps 4 --recipe_batch_size 8 --lr 1e-4 --lr_backbone 1e-5 --warmup_steps 100 \
    --epochs 24 --lr_drop 20 "$@"
