#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), normalisation of the weights, Deformable-DETR, ResNet-50, 20 epochs.
# Row: all weights of an object have the sum 1. The best one on record.
# On record is only that rows are better than the other two, no numbers.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../match_free_r50_20ep.sh" --output_dir exps/match_free/table_norm/row \
    --soft_norm row "$@"
