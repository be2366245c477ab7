#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our two-stage variants with refinement, Deformable-DETR, ResNet-50, 20 epochs.
# Row: match-free supervision, changed so that a young probe does not collapse.
# Proposals are matched by rounds of bids, so that no solver runs (--enc_matcher).
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/hungarian.sh" --output_dir exps/match_free/two_stage/soft \
    --matcher soft "$@"
