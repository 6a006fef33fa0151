#!/usr/bin/env bash
# What both sbatch scripts do: job.sh VERB PRESET [key=value ...]
# Ranks, address and port are read from Slurm's variables by dalle_dist/distributed/process_group.py.
set -euo pipefail
here=$(dirname "$0") verb=$1
shift
[ $# -ge 1 ] || { echo "usage: sbatch $here/${verb/-/_}.sbatch PRESET [key=value ...]" >&2; exit 2; }
[ ! -d .venv ] || source .venv/bin/activate

# Without --ntasks-per-node Slurm starts one task a node, and all other GPUs would idle in silence.
tasks=${SLURM_TASKS_PER_NODE%%[(,]*} gpus=${SLURM_GPUS_ON_NODE:-$tasks}
if [ "$tasks" -ne "$gpus" ]; then
  echo "$verb: $tasks tasks for $gpus GPUs on a node; add --ntasks-per-node $gpus" >&2
  exit 2
fi
# Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

before=$(python "$here/progress.py" "$verb" "$@")
status=0
# --export=ALL: a job submitted with --export=NONE would hide the environment from its tasks too.
srun --export=ALL --kill-on-bad-exit=1 dalle-dist "$verb" "$@" --resume auto || status=$?
after=$(python "$here/progress.py" "$verb" "$@")

if [ "$after" = finished ]; then
  echo "$verb: finished"
  exit "$status"
elif [ "$after" != "$before" ]; then
  echo "$verb: status $status, saved at step $after, not finished; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
else
  # Requeueing a job that saved nothing would only burn the queue in a loop.
  echo "$verb: status $status, newest checkpoint as before ($before); not requeued" >&2
  exit "$((status ? status : 1))"
fi
