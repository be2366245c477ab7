#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), the paper's table, Deformable-DETR, ResNet-50, 20 epochs.
# Row: Hungarian matching. Published AP 25.4.
# On record are only the detector, COCO and 20 epochs. Ours: ResNet-50, rates that drop after 16 epochs (four fifths,
# as 40 of 50), a total batch of 32, and all else as in deformable_detr/r50.sh.
# 25.4 is far below what this recipe is known to give (37.1 after 12 epochs), so the paper's setting was another one, in
# a way that is not on record. Only the difference to match_free_r50_20ep.sh, +0.7, means something, never 25.4 itself.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../deformable_detr/r50.sh" --output_dir exps/match_free/baseline_r50_20ep \
    --epochs 20 --lr_drop 16 "$@"
