#!/bin/sh
# two_stage.sh with mixed selection and look forward twice; H-DETR's third trick, no dropout, is in base.sh already.
exec sh "$(dirname "$0")/base.sh" --output_dir exps/synthetic/two_stage_tricks \
    --with_box_refine --two_stage --mixed_selection --look_forward_twice "$@"
