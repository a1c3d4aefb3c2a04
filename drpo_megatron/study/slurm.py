"""A study as Slurm jobs: an array with a task for every run, after an array that makes the shared starts.

Each task is this command for one cell and one seed, so what it leaves, and what goes on after it, is the same.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from drpo_megatron.files import write_text
from drpo_megatron.slurm.script import sbatch_file, sbatch_value
from drpo_megatron.study.cells import State
from drpo_megatron.study.runs import Run, Study

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --array=0-{last}
#SBATCH --output={output}
TASKS=(
{tasks}
)
eval "exec ${{TASKS[$SLURM_ARRAY_TASK_ID]}}"
"""


def submit(study: Study, states: Mapping[Run, State], options: Sequence[str]) -> list[str]:
    """Submits what isn't done, with these options of sbatch for every task. Returns the jobs' ids.

    Raises: ValueError when there is no sbatch here, or it refuses.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("--slurm: sbatch is not on the PATH of this machine; submit from a login node of the cluster")
    directory = study.runs_dir.absolute() / "slurm"
    directory.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    for name, runs in (("starts", study.prepares), ("cells", study.runs)):
        todo = [run for run in runs if states[run] != "done"]
        if not todo:
            continue
        script = directory / f"{name}.sbatch"
        write_text(script, _script(study, f"{study.file.name}-{name}", directory, todo))
        after = [f"--dependency=afterok:{jobs[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        done = subprocess.run(["sbatch", "--parsable", *after, *options, str(script)], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"--slurm: sbatch refused {script}: {done.stderr.strip()}")
        jobs.append(done.stdout.strip().split(";")[0])
    return jobs


def _script(study: Study, name: str, directory: Path, runs: Sequence[Run]) -> str:
    program = [sys.executable, "-m", "drpo_megatron.cli", "study", str(study.path), "--runs", str(study.runs_dir)]
    tasks = []
    for run in runs:
        only = [part for axis, level in run.levels.items() for part in ("--only", f"{axis}={level}")]
        tasks.append(shlex.join([*program, "--seeds", str(run.seed), *(only or ["--starts"])]))
    lines = "\n".join(shlex.quote(task) for task in tasks)
    output = sbatch_file(str(directory), "%A_%a.out", "the directory of the runs")
    return _SCRIPT.format(name=sbatch_value(name, "the study's name"), last=len(runs) - 1, output=output, tasks=lines)
