#!/bin/sh
# H-DETR (Jia et al., 2023), table 13: one-to-many alone and the two branches, ResNet-50 with tricks, 12 epochs.
# Row: one-to-many branch, no NMS. Published AP 13.5.
# Evaluates what hybrid_r50_12ep.sh has trained. Columns 24 and 36: --resume FILE of such a run (AP 13.1, 12.9).
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/one2one.sh" --output_dir exps/h_detr/table13/one2many \
    --eval_group one2many "$@"
