#!/bin/sh
# crowded.sh with match-free supervision: learned correspondences teach the queries, no solver.
exec sh "$(dirname "$0")/crowded.sh" --output_dir exps/synthetic/crowded_soft --matcher soft "$@"
