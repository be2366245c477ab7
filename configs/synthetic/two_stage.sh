#!/bin/sh
# base.sh with refinement and two stages. What quickstart.sh trains.
exec sh "$(dirname "$0")/base.sh" --output_dir exps/synthetic/two_stage \
    --with_box_refine --two_stage "$@"
