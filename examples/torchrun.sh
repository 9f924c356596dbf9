#!/bin/bash
# A run on several machines that torchrun starts again when a process or a machine dies. The same command on each of them:
#
#     HEAD=node1:29400 NODES=2 examples/torchrun.sh --recipe imagenet100 --data /data/imagenet100 --amp --run-dir /shared/runs/one
#
# HEAD is one of the machines with a free port, NODES how many there are, GPUS how many processes each starts (default: one a GPU).
# --run-dir must lie on a file system that all share. When a process dies, all are ended and started again, up to RESTARTS
# times (default 3), and --continue lets them go on from the newest checkpoint. NODES may be a range, 1:2: then the run goes on with the
# machines that are left, for the batch divides into any number of processes that it is a multiple of.
#
# Ctrl-C and SIGTERM to torchrun end the run with a checkpoint; torchrun's own exit code is then 1. SIGUSR1, which schedulers are
# asked to send before the end, torchrun ignores by itself: here it is passed on, too.

set -euo pipefail

# Without it torchrun (seen in 2.14) reuses one store for all starts, in which the restarted processes may find dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec torchrun --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?HEAD=host:port}" --rdzv-id="${ID:-falcon}" \
    --nnodes="${NODES:-1}" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-3}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    --no-python falcon-fast train "$@" --continue
