#!/usr/bin/env bash
# From a bare checkout to a trained detector, with pictures, in a few minutes on two CPU cores.
#
#   bash configs/quickstart.sh                                          flags of main.py may follow:
#   bash configs/quickstart.sh --seed 1 --output_dir exps/q1
#
# Installs what is missing, trains a small two-stage Deformable-DETR on drawn shapes (no download), evaluates it on
# held-out images, and ends with the line "AP 0.xxx AP50 0.xxx".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source configs/setup_env.sh
setup_env "$PWD/.venv" -r requirements.txt "matplotlib>=3.7"

output_dir=exps/quickstart
previous=""
for word in "$@"; do
    case $previous,$word in
    --output_dir,*) output_dir=$word ;;
    *,--output_dir=*) output_dir=${word#*=} ;;
    esac
    previous=$word
done

say "training; log, checkpoints and pictures go to $output_dir"
sh configs/synthetic/two_stage.sh "$@" --output_dir "$output_dir"

say "drawn predictions: $output_dir/pictures/overview.png"
say "curves:            $output_dir/loss.png  $output_dir/ap.png"
python - "$output_dir/log.txt" <<'PY'
import json
import sys

with open(sys.argv[1]) as log:
    evaluated = [line for line in map(json.loads, log) if "test_coco_eval_bbox" in line]
ap, ap50 = evaluated[-1]["test_coco_eval_bbox"][:2]
print(f"AP {ap:.3f} AP50 {ap50:.3f}")
PY
