#!/bin/sh
# short_cpu.sh from the weights of configs/synthetic/crowded.sh, which learned 10 drawn shapes; INIT names another file.
# Nothing else differs: AP by epoch shows what the weights are worth.
exec sh "$(dirname "$0")/short_cpu.sh" --output_dir exps/bccd/finetune_cpu \
    --init_from "${INIT:-exps/synthetic/crowded/checkpoint.pth}" --init_class_rows "$@"
