#!/usr/bin/env bash
# The falsification test of hybrid matching (H-DETR, table 13) on drawn shapes, about 40 minutes on a CPU:
# trains the hybrid branch for 16 epochs, then evaluates both groups of queries without and with NMS. Flags of main.py
# may follow; an interrupted training goes on.
#
#   bash configs/hybrid_nms.sh --output_dir exps/hybrid_nms --seed 1
#
# Ends with exit code 1 if NMS helps the one-to-one queries or does not help the one-to-many ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output_dir=exps/hybrid_nms
previous=""
for word in "$@"; do
    case $previous,$word in
    --output_dir,*) output_dir=$word ;;
    *,--output_dir=*) output_dir=${word#*=} ;;
    esac
    previous=$word
done
sh configs/synthetic/crowded_branch.sh --epochs 16 --lr_drop 12 --eval_every 4 "$@" --output_dir "$output_dir" --resume auto
LAUNCH="${LAUNCH:-python -u} -m util.nms_study" sh configs/synthetic/crowded_branch.sh "$@" --output_dir "$output_dir" \
    --resume "$output_dir/checkpoint.pth"
