#!/bin/sh
# crowded.sh with match-free supervision, as close to its paper as is known.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_soft_literal --matcher soft-literal "$@"
