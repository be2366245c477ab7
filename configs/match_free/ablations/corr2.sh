#!/bin/sh
# Beyond Hungarian (Qiu et al., 2026), our ablations of soft, Deformable-DETR, ResNet-50, 20 epochs.
# Row: weight of the correspondence loss 2, which trains the queries too (grad_probe_query: 1). Of a loss that trains
# the probe only, as in soft, the weight changes next to nothing: AdamW divides it out.
# Total batch 32: 16 processes x 2, or 8 x 4 with --batch_size 4.
exec sh "$(dirname "$0")/../variants/soft.sh" --output_dir exps/match_free/ablations/corr2 \
    --corr_grad probe+query --corr_loss_coef 2 "$@"
