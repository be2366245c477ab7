#!/bin/sh
# crowded.sh with Co-DETR's K = 1: an ATSS head teaches the encoder, its positives are further queries.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_co1 --aux_heads atss "$@"
