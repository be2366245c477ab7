#!/bin/sh
# Co-DETR (Zong et al., 2023), table 12: depth of the ATSS head, Deformable-DETR, ResNet-50, 12 epochs.
# Row: K = 1, 3 convolutions in each tower. Published AP 42.1.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../table2/k1_12ep.sh" --output_dir exps/co_detr/table12/convs3 \
    --aux_convs 3 "$@"
