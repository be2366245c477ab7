#!/bin/sh
# crowded.sh with hybrid layers of H-DETR: targets four times on the first two of three decoder layers.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_layer \
    --hybrid layer --hybrid_k 4 --hybrid_layers 2 "$@"
