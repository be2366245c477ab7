#!/bin/sh
# H-DETR (Jia et al., 2023), table 9: repeats K with T = 300 K, ResNet-50 with tricks, 12 epochs.
# Row: K = 6 with the careful selection: a class head that ranks the one-to-many proposals.
# No published AP: no gain over k6.sh (48.6) is reported.
# Total batch 16: 8 processes x 2.
exec sh "$(dirname "$0")/k6.sh" --output_dir exps/h_detr/table9/k6_careful \
    --one2many_proposals own "$@"
