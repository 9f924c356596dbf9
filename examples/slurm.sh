#!/bin/bash
# A run under Slurm that survives preemption, node failure and its own time limit:
#
#     sbatch examples/slurm.sh --recipe imagenet100 --data /data/imagenet100 --amp --run-dir /shared/runs/one
#
# The arguments are those of `falcon-fast train`; --run-dir must lie on a file system that all nodes share. One process a GPU, started by
# srun, so that signals and exit codes reach them without torchrun between. Two minutes before the time limit (or when the
# scheduler preempts and grants time for it) Slurm sends SIGUSR1 to this shell, which passes SIGTERM to the processes: they end the
# step, save, and exit with 130; the job then queues itself again. After a node failure, or preemption without warning, Slurm queues it again
# by --requeue. --continue makes of every start the right one: begin, go on, or say that the run is finished. A job whose process
# was killed (137, for example when memory ran out), or that failed in a way that may pass (75), is queued again, but only while
# the job has been started fewer than RETRIES times (default 20). A job that fails otherwise is not queued again; one that is ended by `scancel JOB` saves (Slurm waits KillWait, 30 s) and stays ended.
#
#SBATCH --job-name=falcon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -uo pipefail

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# Runs in the shell: bash acts on a trap only when what it waits for is in the background.
trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# exec: the process that Slurm signals is the trainer itself. (The task's numbers are srun's, so not for this shell to expand.)
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec falcon-fast train "$@"' \
    falcon-fast "$@" --continue &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do # the trap ended the wait, not the step
    wait "$step"
    code=$?
done

again=no
case $code in
130) again=yes ;; # stopped by a signal, and saved
75 | 137) [ "${SLURM_RESTART_COUNT:-0}" -lt "${RETRIES:-20}" ] && again=yes ;;
esac
if [ "$again" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
