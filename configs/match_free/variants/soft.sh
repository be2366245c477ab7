#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our variants, Deformable-DETR, ResNet-50, 20 epochs.
# Row: match-free supervision, changed so that a young probe does not collapse.
# Ours, not the paper's: bounded logits that see boxes, objects that compete for queries, a first help by
# distance, two losses that do not teach the same twice. The files of ../ablations change one of them at a time.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../baseline_r50_20ep.sh" --output_dir exps/match_free/variants/soft \
    --matcher soft "$@"
