#!/bin/sh
# One machine, N processes, one GPU each (without GPUs: N processes on the CPU, over gloo).
#
#   configs/launch_dist.sh 8 configs/deformable_detr/two_stage.sh [flags]
#   CUDA_VISIBLE_DEVICES=2,3 configs/launch_dist.sh 2 configs/h_detr/tricks_r50_12ep.sh --batch_size 8
#
# Several such runs may share the machine: each takes a free port.
usage="usage: $0 PROCESSES PRESET [flags of main.py]"
processes=${1:?$usage}
preset=${2:?$usage}
shift 2

# torchrun would set one thread and warn. That is slow where the CPU does the work, so the cores are shared out.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
share=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}"
export LAUNCH="python -m torch.distributed.run --standalone --nproc_per_node $processes"
exec sh "$preset" "$@"
