#!/usr/bin/env bash
# What both sbatch scripts do: job.sh VERB RUN_PATH_KEY PRESET [key=value ...]
set -euo pipefail
verb=$1 run_key=$2
shift 2
[ $# -ge 1 ] || { echo "usage: sbatch slurm/${SLURM_JOB_NAME:-train}.sbatch PRESET [key=value ...]" >&2; exit 2; }
[ ! -d .venv ] || source .venv/bin/activate

# All ranks must find the same port free on the first node; the program derives it from the job id.
run=$(dalle-dist config "$@" | sed -n "s/^  $run_key: //p")
newest() { ls -d "$run"/checkpoints/step-???????? 2>/dev/null | tail -n 1 || true; }
finished() { [ -e "$run/release/config.yaml" ]; }

before=$(newest)
status=0
srun --kill-on-bad-exit=1 dalle-dist "$verb" "$@" --resume auto || status=$?

if finished; then
  echo "$run: finished"
elif [ "$(newest)" != "$before" ]; then
  echo "$run: not finished, newest checkpoint $(newest); requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
else
  # Requeueing a job that saved nothing would only burn the queue in a loop.
  echo "$run: ended with status $status without a new checkpoint; not requeued" >&2
  exit "$((status ? status : 1))"
fi
