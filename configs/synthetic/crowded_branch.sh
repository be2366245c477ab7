#!/bin/sh
# crowded.sh with the hybrid branch of H-DETR: 300 more queries in training, matched six times.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_branch \
    --num_queries_one2many 300 --k_one2many 6 "$@"
