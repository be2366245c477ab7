#!/usr/bin/env bash
# Match-free supervision against Hungarian matching on drawn shapes: every matcher with every seed, with and without NMS,
# and a table of them. On two CPU cores a run takes about ten minutes; what is there is not done again, and an
# interrupted run goes on.
#
#   SEEDS="1 2 3" MATCHERS="hungarian cost-greedy soft soft-literal" bash configs/matchers.sh [FLAGS]
#   PRESET=configs/synthetic/crowded_branch.sh OUTPUT=exps/matchers_branch bash configs/matchers.sh
#   MATCHERS=soft OUTPUT=exps/matchers_rho bash configs/matchers.sh --scg_rho 0.75
#
# PRESET, by default configs/synthetic/crowded.sh, has the other flags; FLAGS of main.py win. All matchers get both, so
# that --matcher hungarian stops at a flag about learned matchers: give such flags to one matcher, as in the last line.
# Runs are in OUTPUT/MATCHER_seedN, the table is in OUTPUT/table.md (OUTPUT: exps/matchers). A run that is finished is
# not compared with PRESET and FLAGS: other ones need another OUTPUT, or the table would mix them.
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
