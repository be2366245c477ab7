#!/bin/sh
# crowded.sh with Co-DETR's K = 2: ATSS and Faster R-CNN, whose second stage learns from 64 regions of an image, not
# 512: on small images those are enough, and on a processor they take most of the time.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_co2 --aux_heads atss faster_rcnn \
    --roi_samples 64 "$@"
