#!/bin/sh
# crowded.sh with rounds of bids by matching cost: the control of crowded_soft.sh, without a probe.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_greedy --matcher cost-greedy "$@"
