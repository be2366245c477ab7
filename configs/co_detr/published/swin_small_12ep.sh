#!/bin/sh
# Co-DETR (Zong et al., 2023), files of the authors, evaluation.
# Row: co_deformable_detr_swin_small_1x_coco, 100 detections kept per image. Published AP 53.4.
# --resume FILE takes another file. Its heads alone: --eval_head atss, --eval_head faster_rcnn.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/../k2_swin_small_12ep.sh" --output_dir exps/co_detr/published/swin_small_12ep \
    --eval --resume data/co_detr/co_deformable_detr_swin_small_1x_coco.pth "$@"
