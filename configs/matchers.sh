#!/usr/bin/env bash
# Match-free supervision against Hungarian matching on drawn shapes: every matcher with every seed, with and without NMS,
# and a table of them. On two CPU cores a run takes about ten minutes; what is there is not done again, and an
# interrupted run goes on. Flags of main.py may follow.
#
#   SEEDS="1 2 3" MATCHERS="hungarian cost-greedy soft soft-literal" bash configs/matchers.sh [FLAGS]
#
# Runs are in exps/matchers/MATCHER_seedN (another folder: OUTPUT=...), the table is in exps/matchers/table.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output=${OUTPUT:-exps/matchers}
preset=${PRESET:-configs/synthetic/crowded.sh}
runs=()
for seed in ${SEEDS:-1 2 3}; do
    for matcher in ${MATCHERS:-hungarian cost-greedy soft soft-literal}; do
        run=$output/${matcher}_seed$seed
        runs+=("$run")
        [[ -e $run/nms/eval/stats.json ]] && continue
        sh "$preset" --matcher "$matcher" --seed "$seed" "$@" --output_dir "$run" --resume auto
        sh "$preset" --matcher "$matcher" "$@" --output_dir "$run/nms" \
            --eval --resume "$run/checkpoint.pth" --nms_iou 0.7 --no-eval_loss --draw 0
    done
done
python -m util.run_table "${runs[@]}" --output "$output/table.md"
