"""The constant parts of the batch scripts: everything that differs between runs is a variable set before them.

Whether a job is done, to be queued again or refused is decided by what it leaves behind: srun reports the largest exit
code of all tasks, in which the refusal (2 or 4) of one drowns in the signals that end the others.
"""

PRELUDE = """\
set -uo pipefail
mkdir -p "$STATE_DIR"
refused="$STATE_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.refused"
rm -f "$refused"
this_job="$SLURM_JOB_ID"
# the task of an array that starts last carries the number of the array, which means all its tasks
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then this_job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
job_port=$((20000 + SLURM_JOB_ID % 10000))
stop=""

# USR1 comes before the time limit, TERM with a preemption: the work saves and ends, then the job is queued again
trap 'stop=USR1; stop_work USR1' USR1
trap 'stop=TERM; stop_work TERM' TERM

clean_up() { :; }
trap 'clean_up' EXIT

wait_for() { # the exit code of a process, however many signals this shell receives meanwhile
    local code
    wait "$1"
    code=$?
    while kill -0 "$1" 2>/dev/null; do
        wait "$1"
        code=$?
    done
    return "$code"
}

end_job() { # 0 is done; 2, 4 and an error of its own (1) stay failed; anything else is worth another try
    local code=$1 state
    if [ -s "$refused" ]; then code=$(cat "$refused"); fi
    case "$code" in 0 | 2 | 4) exit "$code" ;; esac
    if [ "$code" -eq 1 ] && [ -z "$stop" ]; then exit 1; fi
    state=$(squeue --noheader --jobs="$this_job" --format=%T)
    if [ "$state" != RUNNING ]; then
        exit 3 # cancelled, or Slurm itself queues it again
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
        echo "incomplete after $MAX_REQUEUES requeues (exit code $code)" >&2
        exit 3
    fi
    echo "incomplete (exit code $code${stop:+, after $stop}): queued again" >&2
    clean_up # now: later it would meet the job that is queued again
    trap - EXIT
    trap 'exit 3' TERM # Slurm ends this script before it starts the next
    scontrol requeue "$this_job" && sleep 60 &
    wait "$!"
    exit 3
}
"""

CACHE = """\
work=""
stop_work() { if [ -n "$work" ]; then kill -TERM "$work" 2>/dev/null; fi; }

# Ray over all nodes, guarded by a token that only this user can read
ray_dir="/tmp/genrecal-ray-$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$STATE_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.token"
unset RAY_AUTH_TOKEN
(umask 077 && rm -f "$RAY_AUTH_TOKEN_PATH" && od -An -N32 -tx1 /dev/urandom | tr -d ' \\n' >"$RAY_AUTH_TOKEN_PATH")
export RAY_ADDRESS="$head_node:$job_port" RAY_USAGE_STATS_ENABLED=0
export ray_dir job_port
srun --export=ALL --kill-on-bad-exit=1 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \\
    --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    ports="--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0"
    cores="--num-cpus=$SLURM_CPUS_ON_NODE"
    if [ "$SLURM_NODEID" -eq 0 ]; then
        start=(--head --port="$job_port" --ray-client-server-port="$((job_port + 10000))" --include-dashboard=false
            --temp-dir="$ray_dir")
    else
        until (exec 3<>"/dev/tcp/${RAY_ADDRESS%:*}/$job_port") 2>/dev/null; do sleep 1; done
        start=(--address="$RAY_ADDRESS")
    fi
    for attempt in 1 2 3; do # on a busy node Ray may not come up within its 30 s
        ray start --block "${start[@]}" $ports $cores && exit 0
        sleep 5
    done
    exit 1
' >"$STATE_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID.ray.log" 2>&1 &
ray_step=$!
clean_up() {
    rm -f "$RAY_AUTH_TOKEN_PATH"
    timeout 10 scancel --signal=KILL "$this_job.0" # the step that runs Ray
    wait "$ray_step"
    timeout 60 srun --export=ALL rm -rf "$ray_dir"
}

run_step() {
    "$@" &
    work=$!
    wait_for "$work"
    code=$?
    work=""
    if [ "$code" -ne 0 ] && ! kill -0 "$ray_step" 2>/dev/null; then code=3; fi # Ray is gone: not the step's fault
    if [ "$code" -ne 0 ]; then end_job "$code"; fi
}

run_step python -m launch.clusters.ray_nodes --nodes "$SLURM_JOB_NUM_NODES" --limit-s 900
"""

CACHE_ANSWERS = """\
run_step genrecal cache answers "$RUN_FILE"
"""

CACHE_BUILD = """\
run_step genrecal cache build "$RUN_FILE"
end_job 0
"""

TRAIN = """\
stop_work() {
    # every task, not this script; with TERM Slurm has told them itself. Unlimited, scancel would try until it meets the
    # job that is queued again
    if [ "$1" = USR1 ]; then timeout 10 scancel --signal=TERM "$this_job"; fi
}

export STUDENT="${STUDENTS[$SLURM_ARRAY_TASK_ID]}" RUN_FILE refused
export MASTER_ADDR="$head_node" MASTER_PORT="$job_port"
export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    trap : TERM # genrecal saves and ends by itself
    genrecal train "$RUN_FILE" --student "$STUDENT"
    code=$?
    case "$code" in 2 | 4) echo "$code" >"$refused" ;; esac
    exit "$code"
' &
step=$!
wait_for "$step"
end_job "$?"
"""

REPORT = """\
work=""
stop_work() { if [ -n "$work" ]; then kill -TERM "$work" 2>/dev/null; fi; }

python -m launch.clusters.report_job "$RUN_FILE" &
work=$!
wait_for "$work"
end_job "$?"
"""
