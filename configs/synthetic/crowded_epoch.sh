#!/bin/sh
# crowded.sh with hybrid epochs of H-DETR: targets four times in the first four of six epochs.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_epoch \
    --hybrid epoch --hybrid_k 4 "$@"
