#!/bin/sh
# crowded_dino.sh with Co-DETR's K = 1: an ATSS head teaches the encoder, its positives are further queries.
exec sh "$(dirname "$0")/crowded_dino.sh" --output_dir exps/synthetic/crowded_co_dino --aux_heads atss "$@"
