#!/bin/sh
# Co-DETR (Zong et al., 2023), comparison with Group-DETR, Deformable-DETR, ResNet-50, 36 epochs.
# Row: Group-DETR, 3 groups of 300 queries, each matched one-to-one. Published AP 44.6.
# The comparison is table9/head.sh after 36 epochs (AP 46.2). All groups weigh the same.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/table2/k0_36ep.sh" --output_dir exps/co_detr/group_detr_r50_36ep \
    --num_queries_one2many 600 --k_one2many 2 --one2many_groups isolated "$@"
