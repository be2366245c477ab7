#!/bin/sh
# Where training schemes differ: 4 to 14 small objects of 10 classes on 160 pixels, partly covered, and more proposals
# than one-to-one queries. Two-stage with tricks, 100 queries. The one-to-one baseline of crowded_*.sh.
exec sh "$(dirname "$0")/two_stage_tricks.sh" --output_dir exps/synthetic/crowded \
    --synthetic_train 1000 --synthetic_val 300 --synthetic_size 160 160 --synthetic_classes 10 \
    --synthetic_objects 4 14 --synthetic_object_size 0.08 0.3 --synthetic_overlap 0.3 --synthetic_texture 0.4 \
    --num_queries_one2one 100 --epochs 6 --lr_drop 5 "$@"
