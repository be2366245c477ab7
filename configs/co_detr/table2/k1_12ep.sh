#!/bin/sh
# Co-DETR (Zong et al., 2023), table 2, Deformable-DETR (one stage, no refinement), ResNet-50, 12 epochs.
# Row: K = 1 (ATSS). Published AP 42.3.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/k0_12ep.sh" --output_dir exps/co_detr/table2/k1_12ep \
    --aux_heads atss "$@"
