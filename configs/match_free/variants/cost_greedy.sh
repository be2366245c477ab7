#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our variants, Deformable-DETR, ResNet-50, 20 epochs.
# Row: the control: rounds of bids by matching cost, no probe and no solver.
# Only what soft.sh gains beyond this one can be credited to learned correspondence.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../baseline_r50_20ep.sh" --output_dir exps/match_free/variants/cost_greedy \
    --matcher cost-greedy "$@"
