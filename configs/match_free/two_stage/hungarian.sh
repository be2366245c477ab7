#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our two-stage variants with refinement, Deformable-DETR, ResNet-50, 20 epochs.
# Row: Hungarian matching.
# The other files of this folder are this one with another matcher. Queries come from proposals and know from the start
# where they are, so a probe is less likely to collapse than with learned queries.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../baseline_r50_20ep.sh" --output_dir exps/match_free/two_stage/hungarian \
    --with_box_refine --two_stage "$@"
