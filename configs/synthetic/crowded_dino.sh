#!/bin/sh
# crowded.sh as DINO: queries are boxes, proposals are ranked by class, denoising. Class losses weigh 2 as in crowded.sh,
# not DINO's 1, with which so short a training falls behind.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_dino \
    --query_pos box --decoder_norm --share_heads --pe_temperature 20 --no-pe_half_cell --logit_eps 1e-3 \
    --giou_eps 1e-6 --dn_number 100 "$@"
