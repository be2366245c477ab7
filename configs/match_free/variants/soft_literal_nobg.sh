#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our variants, Deformable-DETR, ResNet-50, 20 epochs.
# Row: soft-literal, queries without an object learn nothing.
# One of two readings: the paper as described does not say what they learn.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../match_free_r50_20ep.sh" --output_dir exps/match_free/variants/soft_literal_nobg \
    --no-soft_background "$@"
