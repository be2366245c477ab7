#!/bin/sh
# base.sh with iterative box refinement.
exec sh "$(dirname "$0")/base.sh" --output_dir exps/synthetic/refine \
    --with_box_refine "$@"
