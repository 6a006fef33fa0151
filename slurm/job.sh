#!/usr/bin/env bash
# What all scripts do: job.sh VERB ARGUMENT..., inside a Slurm job. One task per GPU, no ssh: ranks,
# address and port are read from Slurm's variables (dalle_dist/distributed/launchers.py).
#
# Of the environment:
#   DALLE_DIST_SITE     what the site needs; default: site.sh beside this file
#   DALLE_DIST_DOCTOR   dalle-dist doctor before training: full, quick or 0 (full)
#   DALLE_DIST_REQUEUE  0: never back into the queue, e.g. in a chain of jobs
#   DALLE_DIST_TRIES    starts in a row that may come no further (3)
#   DALLE_DIST_LOGS     folder of each node's log (the working folder)
set -euo pipefail
batch=() inside=() task_options=()
site=${DALLE_DIST_SITE:-$(dirname "$0")/site.sh}
[ ! -f "$site" ] || source "$site"

verb=$1 job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
command=("$@") training=
case $verb in train*) training=yes ;; esac
say() { echo "$verb: $*"; }

# Without --ntasks-per-node Slurm starts one task a node, and all other GPUs would idle in silence.
tasks=${SLURM_TASKS_PER_NODE%%[(,]*} gpus=${SLURM_GPUS_ON_NODE:-0}
if [ "$gpus" -gt 0 ] && [ "$tasks" -ne "$gpus" ]; then
  say "$tasks tasks for $gpus GPUs on a node; add --ntasks-per-node $gpus" >&2
  exit 2
fi
# Since Slurm 22.05 srun no longer takes --cpus-per-task over from sbatch by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

if [ -n "$training" ]; then
  command+=(--resume auto)
elif [ -n "${SLURM_ARRAY_TASK_COUNT:-}" ]; then  # of numbers without gaps
  command+=(--shard "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN + 1))/$SLURM_ARRAY_TASK_COUNT")
fi

progress() { ${batch[@]+"${batch[@]}"} python -m dalle_dist progress "$@"; }

# One log for each node, also where they share no file system; this job's own shows the first one.
logs=${DALLE_DIST_LOGS:-.}/slurm-${SLURM_JOB_NAME:-dalle-dist}-$job
on_all() {
  local own=$logs-0-$(hostname -s).log before=0 status=0
  mkdir -p "$(dirname "$logs")"
  [ ! -f "$own" ] || before=$(wc -c <"$own")
  # --export=ALL: a job submitted with --export=NONE would hide the environment from its tasks too.
  srun --export=ALL --kill-on-bad-exit=1 --wait=60 --open-mode=append --output="$logs-%n-%N.log" \
    ${task_options[@]+"${task_options[@]}"} ${inside[@]+"${inside[@]}"} dalle-dist "$@" &
  local step=$!
  tail --pid="$step" --sleep-interval=0.5 --bytes=+$((before + 1)) -F "$own" 2>/dev/null &
  wait "$step" || status=$?
  wait
  return "$status"
}

requeue() {
  if [ "${DALLE_DIST_REQUEUE:-1}" = 0 ]; then
    say "$1; the next job of the chain goes on"
  elif say "$1; requeueing job $job" && ! scontrol requeue "$job"; then
    say "this site does not let a job requeue itself; dalle-dist submit --chain N needs no requeue" >&2
    exit 1
  fi
  exit 0
}

before=$(progress "$@") status=0
case $before in finished | stopped) say "$before; nothing to do"; exit 0 ;; esac
if [ -n "$training" ] && [ "${DALLE_DIST_DOCTOR:-full}" != 0 ]; then
  doctor=(doctor --for "$verb")
  [ "${DALLE_DIST_DOCTOR:-full}" != quick ] || doctor+=(--quick)
  for word in "${@:2}"; do
    case $word in --*) ;; *) doctor+=("$word") ;; esac
  done
  on_all "${doctor[@]}" || status=$?
fi
[ "$status" -ne 0 ] || on_all "${command[@]}" || status=$?
# A store that does not answer now must not end a run of weeks.
after=$(progress "$@") || after=$before
[ -n "$training" ] || [ "$status" -ne 0 ] || after=finished

case $after in
  finished | stopped) say "$after"; exit "$status" ;;
  "$before") ;;
  *) requeue "status $status, saved $after, not finished" ;;
esac
# An error that somebody must mend would only burn the queue.
if [ "$status" -ne 2 ] && tries=$(progress --in-vain "$@") &&
  [ "$tries" -lt "${DALLE_DIST_TRIES:-3}" ]; then
  requeue "status $status, no further than before ($before), start $tries of ${DALLE_DIST_TRIES:-3}"
fi
say "status $status, no further than before ($before); not requeued" >&2
exit "$((status ? status : 1))"
