"""The sbatch script of a run. `slurm/train.sbatch` is one, written by this module."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from drpo_megatron.paths import unshown_characters
from drpo_megatron.slurm.layout import Nodes


@dataclass(frozen=True, slots=True)
class Job:
    name: str
    nodes: Nodes
    run_dir: str
    """Absolute, on a file system that all nodes share."""
    working_dir: str
    """Where the relative paths of the configuration start."""
    program: tuple[str, ...]
    """The command `drpo-megatron` as nodes, or their containers, have it."""
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """An image for srun's --container-image, the option of the pyxis plugin."""
    mounts: tuple[str, ...] = ()
    """Directories that the container sees under the same names."""


_SAFE = re.compile(r"[\w.,:@+=/~^!&;()\[\]{}<>|*?$` -]*")
"""What sbatch takes as it stands in a line of #SBATCH: no quote, backslash or #, which it reads in ways of its own, and no %,
which it replaces in file names."""
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE")


def sbatch_value(value: str, what: str) -> str:
    """An option's value for a line of #SBATCH. ValueError, which names `what`, where sbatch would take it for another."""
    if not value or not _SAFE.fullmatch(value) or unshown_characters(value):
        odd = next((c for c in value if not _SAFE.fullmatch(c) or unshown_characters(c)), "")
        raise ValueError(
            f"{what} {ascii(value)} has {ascii(odd)} in it, which sbatch doesn't take; rename it"
            if odd
            else f"{what} is empty"
        )
    return f'"{value}"' if " " in value else value


def sbatch_file(directory: str, name: str, what: str) -> str:
    """`directory/name` for a line of #SBATCH, where `name` may have sbatch's own placeholders and the directory none."""
    checked = sbatch_value(directory, what)
    return f'"{directory}/{name}"' if checked.startswith('"') else f"{directory}/{name}"


def sbatch_script(job: Job) -> str:
    """The script. ValueError, which names the option, for a text that can't be passed on as it is."""
    if job.time and not _TIME.fullmatch(job.time):
        raise ValueError(f"--time {ascii(job.time)}: give minutes, hours:minutes:seconds or days-hours:minutes:seconds")
    asked = {
        "gpus-per-node": str(job.nodes.gpus_each or ""),
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
    }
    container = []
    if job.container:
        if odd := [path for path in job.mounts if set(path) & set(",:")]:
            raise ValueError(
                f"{ascii(odd[0])} can't be mounted: --container-mounts ends a path at ',' and ':'; rename it"
            )
        mounts = ",".join(f"{path}:{path}" for path in job.mounts)
        container = [f"--container-image={job.container}", f"--container-mounts={mounts}"]
        container.append(f"--container-workdir={job.working_dir}")
    values = {
        "NAME": sbatch_value(job.name, "run.name"),
        "NODES": str(job.nodes.count),
        "ASKED": "".join(
            f"#SBATCH --{option}={sbatch_value(value, f'--{option}')}\n"
            for option, value in asked.items()
            if value not in (None, "")
        ),
        "WORKING_DIR": sbatch_value(job.working_dir, "the working directory"),
        "OUTPUT": sbatch_file(job.run_dir, "slurm/%j.out", "the run directory"),
        "RUN": shlex.quote(job.run_dir),
        "PROGRAM": shlex.join(job.program),
        "CONTAINER": shlex.join(container),
    }
    return re.sub(
        r"@([A-Z_]+)@", lambda match: values[match[1]], _SCRIPT
    )  # Once: a value may look like a place for one.


_SCRIPT = r"""#!/bin/bash
#SBATCH --job-name=@NAME@
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
@ASKED@#SBATCH --chdir=@WORKING_DIR@
#SBATCH --output=@OUTPUT@
#SBATCH --open-mode=append
#SBATCH --requeue
# So many seconds before the time limit: at least a step and a checkpoint of the run.
#SBATCH --signal=B:USR1@300

# `train --resume` starts this run, and continues it after its newest complete checkpoint when the job was requeued.
RUN=@RUN@
DRPO=(@PROGRAM@)
CONTAINER=(@CONTAINER@)

# Files of this start of the job. Its Ray has ports, a temporary directory and a password of its own.
JOB=$RUN/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
mkdir -p "$JOB"
scontrol show node --oneliner "$SLURM_JOB_NODELIST" > "$JOB/nodes"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$JOB/ray_token
(umask 077 && od -An -N32 -tx8 /dev/urandom | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
echo "$(date -Is) job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST; its files: $JOB"

STEP=(srun --overlap --export=ALL --cpu-bind=none "${CONTAINER[@]}")
EVERY_NODE=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1)
FIRST_NODE=(--nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME")

# The warning of a time limit (USR1) or a preemption (TERM) goes on to the run. bash answers a signal when the command in
# front has ended, but ends `wait` for it; so every command that takes long runs in the background.
told=
num_told=0
training=
tell() {
    told=$1
    ((num_told += 1))
    if [[ $training ]]; then kill -s "$told" "$training"; fi
}
trap 'tell USR1' USR1
trap 'tell TERM' TERM

# The exit code of process $1. A signal ends `wait`, but not the process; 127 says that its end was reported before.
finish() {
    local before code=0 result
    while true; do
        before=$num_told
        wait "$1"
        result=$?
        if ((result != 127)); then code=$result; fi
        if ((num_told == before)); then return "$code"; fi
    done
}

requeue() {
    trap - USR1 TERM
    # A job that was cancelled stays so.
    if [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
        echo "$(date -Is) requeueing: $1"
        scontrol requeue "$SLURM_JOB_ID" && sleep 120 # Slurm ends this script.
    fi
    exit 75
}

# 1. Do all nodes have the same packages and GPUs, and do they see the run and the model?
"${STEP[@]}" "${EVERY_NODE[@]}" --kill-on-bad-exit=1 "${DRPO[@]}" slurm check "$JOB" &
finish $! || exit 2

# 2. Ray on every node. The first one is its head and writes down where it listens.
"${STEP[@]}" "${EVERY_NODE[@]}" --kill-on-bad-exit=0 --output="$JOB/ray-%n-%N.log" "${DRPO[@]}" slurm ray "$JOB" &
ray=$!
until [[ -s $JOB/ray_address ]]; do
    if ! kill -0 "$ray" 2> /dev/null; then
        echo "error: Ray did not start; $JOB/ray-*.log say why" >&2
        exit 1
    fi
    sleep 1
done
export RAY_ADDRESS
RAY_ADDRESS=$(< "$JOB/ray_address")

# 3. The run, which places ranks and engines over the nodes. Each writes its output to $RUN/logs.
"${STEP[@]}" "${FIRST_NODE[@]}" "${DRPO[@]}" train --resume "$RUN" \
    cluster.ray_address=auto cluster.num_machines="$SLURM_JOB_NUM_NODES" &
training=$!
if [[ $told ]]; then tell "$told"; fi
finish "$training"
code=$?
training=

kill -s USR2 "$ray" 2> /dev/null
for _ in {1..30}; do
    if ! kill -0 "$ray" 2> /dev/null; then break; fi
    sleep 1
done

case $code in
75 | 138 | 143) # Stopped with a checkpoint, or by USR1 or TERM before it had begun.
    requeue "told to stop by ${told:-a signal}" ;;
76) # A node was lost. Slurm requeues the job when it notices; a job requeued earlier could get the same node.
    patience=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    echo "$(date -Is) a node was lost: waiting up to $((patience + 60)) s for Slurm to requeue the job on others"
    trap - USR1 TERM
    sleep $((patience + 60))
    requeue "a node was lost, and Slurm has not noticed" ;;
*)
    exit "$code" ;;
esac
"""
