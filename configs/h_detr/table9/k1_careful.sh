#!/bin/sh
# H-DETR (Jia et al., 2023), table 9: repeats K with T = 300 K, ResNet-50 with tricks, 12 epochs.
# Row: K = 1 with the careful selection: a class head that ranks the one-to-many proposals.
# Published AP 47.9.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k1.sh" --output_dir exps/h_detr/table9/k1_careful \
    --one2many_proposals own "$@"
