#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our variants, Deformable-DETR, ResNet-50, 20 epochs.
# Row: soft, one query for every object from the start.
# The class target is 1 then, no longer a weight (--cls_target).
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/soft.sh" --output_dir exps/match_free/variants/soft_rounds \
    --scg rounds "$@"
