#!/bin/sh
# Beyond Hungarian (arXiv 2603.08514) on DINO-4scale: no solver in the step, ResNet-50, 12 epochs.
# Row: our combination; no published AP.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/dino_4scale_r50_12ep.sh" --output_dir exps/dab_dino/soft_dino_4scale_r50_12ep \
    --matcher soft "$@"
