#!/bin/sh
# SLURM, one task per GPU; main.py takes its rank and the address of the first machine from SLURM's variables.
#
#   configs/launch_slurm.sh PARTITION JOB GPUS PRESET [flags]
#   configs/launch_slurm.sh gpu two_stage 16 configs/deformable_detr/two_stage.sh
#   GPUS_PER_NODE=4 SRUN_ARGS="--time 2-0 --mem 200G" configs/launch_slurm.sh gpu two_stage 8 PRESET --batch_size 4
#
#   GPUS_PER_NODE   GPUs to take from each machine (8, or GPUS if that is less)
#   CPUS_PER_TASK   cores per GPU; the loader's --num_workers run on them (5)
#   SRUN_ARGS       anything else for srun, split at spaces
usage="usage: $0 PARTITION JOB GPUS PRESET [flags of main.py]"
partition=${1:?$usage}
job=${2:?$usage}
gpus=${3:?$usage}
preset=${4:?$usage}
shift 4

per_node=${GPUS_PER_NODE:-8}
if [ "$gpus" -lt "$per_node" ]; then
    per_node=$gpus
fi
if [ $((gpus % per_node)) -ne 0 ]; then
    echo "error: $gpus GPUS cannot be shared out at $per_node a machine: set GPUS_PER_NODE to a divisor of $gpus" >&2
    exit 2
fi
# shellcheck disable=SC2086  # SRUN_ARGS is meant to be split
exec srun --partition "$partition" --job-name "$job" --ntasks "$gpus" --ntasks-per-node "$per_node" \
    --gres "gpu:$per_node" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} sh "$preset" "$@"
