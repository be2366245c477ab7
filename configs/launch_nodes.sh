#!/bin/sh
# Several machines without a scheduler: the same line on each, only NODE_RANK differs.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 configs/launch_nodes.sh configs/deformable_detr/two_stage.sh [flags]
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 configs/launch_nodes.sh configs/deformable_detr/two_stage.sh [flags]
#
#   NNODES          number of machines
#   NODE_RANK       0 .. NNODES-1
#   MASTER_ADDR     name or address of machine 0, as the others reach it
#   MASTER_PORT     a free port there, the same on all machines (29500)
#   GPUS_PER_NODE   processes on this machine (all its GPUs)
preset=${1:?usage: NNODES=.. NODE_RANK=.. MASTER_ADDR=.. $0 PRESET [flags of main.py]}
shift
: "${NNODES:?number of machines, see the head of $0}"
: "${NODE_RANK:?0 .. NNODES-1, see the head of $0}"
: "${MASTER_ADDR:?name or address of machine 0, see the head of $0}"

LAUNCH="python -m torch.distributed.run --nnodes $NNODES --node_rank $NODE_RANK --nproc_per_node ${GPUS_PER_NODE:-gpu}"
export LAUNCH="$LAUNCH --master_addr $MASTER_ADDR --master_port ${MASTER_PORT:-29500}"
exec sh "$preset" "$@"
