"""Whatever text users have in names and paths: the scripts say it to sbatch and bash as it is, or it is refused."""

from __future__ import annotations

import random
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drpo_megatron.slurm.layout import Nodes
from drpo_megatron.slurm.script import Job, sbatch_script
from drpo_megatron.study.slurm import _script

NASTY = [
    "\n",
    "\n#SBATCH --uid=0\n",
    "$(touch pwned)",
    "`touch pwned`",
    "'",
    '"',
    "\\",
    " ",
    "; touch pwned",
    "&",
    "|",
    "*",
]
NASTY += [
    "$HOME",
    "${RUN}",
    "@RUN@",
    "@PROGRAM@",
    "%j",
    "#",
    "\t",
    "\r",
    "\0",
    "\x1b[2J",
    "\u2028",
    "é",
    "!",
    "{}",
    "-",
    "=",
    "~",
]
JOB = Job("run", Nodes(2, 8), "/shared/runs/run", "/shared/work", ("python3", "-m", "drpo_megatron.cli"))
_SHOW = '\nprintf "%s\\0" "$RUN" "${DRPO[@]}" "${CONTAINER[@]}" "$JOB"\n'


def texts(count: int, prefix: str = "") -> list[str]:
    """Each nasty piece alone in a word, then random words of several."""
    rng = random.Random(0)
    mixed = [
        "".join(rng.choice([*NASTY, "a", "b/"]) for _ in range(rng.randint(1, 5))) for _ in range(count - len(NASTY))
    ]
    return [prefix + text for text in [*(f"a{piece}b" for piece in NASTY), *mixed]]


def sbatch_options(script: str) -> dict[str, str]:
    """What sbatch reads: lines of #SBATCH before the first command, words with quotes and backslashes as a shell's."""
    options: dict[str, str] = {}
    for line in script.split("\n")[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            [word] = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            name, _, value = word.partition("=")
            assert name not in options
            options[name] = value
    return options


def seen_by_bash(script: str, tmp_path: Path) -> list[str]:
    """The variables that the script sets, after bash has read all of it and run the lines that set them."""
    assert subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True).stderr == b""
    begin = script.index("\nRUN=")
    head = script[begin : script.index("\nmkdir -p", begin)]
    done = subprocess.run(
        ["bash", "-u"], input=f"SLURM_JOB_ID=7{head}{_SHOW}".encode(), cwd=tmp_path, capture_output=True
    )
    assert done.stderr == b"" and list(tmp_path.iterdir()) == []
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize("field", ["name", "run_dir", "working_dir", "partition", "account", "time"])
def test_sbatch_and_bash_see_a_text_as_it_is_or_it_is_refused(field: str, tmp_path: Path) -> None:
    plain, num_taken = sbatch_options(sbatch_script(JOB)), 0
    of_field = {"name": "--job-name", "working_dir": "--chdir", "run_dir": "--output"}
    option = of_field.get(field, f"--{field}")
    for text in texts(60, "/" if field.endswith("_dir") else ""):
        job = replace(JOB, **{field: text})
        try:
            script = sbatch_script(job)
        except ValueError as error:
            assert str(error).isprintable()
            continue
        num_taken += 1
        value = f"{text}/slurm/%j.out" if field == "run_dir" else text
        assert sbatch_options(script) == plain | {option: value}
        assert seen_by_bash(script, tmp_path) == [job.run_dir, *job.program, f"{job.run_dir}/slurm/7.0"]
    assert (num_taken == 0) if field == "time" else (num_taken >= 10)


def test_bash_sees_programs_and_containers_as_they_are(tmp_path: Path) -> None:
    for text in texts(60):
        if "\0" in text:
            continue  # No system call takes it.
        job = replace(JOB, program=(text, "-m"), container=text, mounts=("/a b", "/" + re.sub("[,:]", "", text)))
        image, mounts, workdir = seen_by_bash(sbatch_script(job), tmp_path)[3:6]
        assert seen_by_bash(sbatch_script(job), tmp_path)[1] == text
        assert image == f"--container-image={text}" and workdir == "--container-workdir=/shared/work"
        assert mounts == f"--container-mounts=/a b:/a b,{job.mounts[1]}:{job.mounts[1]}"


@pytest.mark.parametrize("path", ["/data/a:b", "/data/a,b"])
def test_a_mount_that_would_be_two_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="can't be mounted: --container-mounts ends a path at"):
        sbatch_script(replace(JOB, container="image", mounts=(path,)))


@pytest.mark.parametrize("time", ["30", "24:00:00", "1-0", "2-12:30:00", "UNLIMITED"])
def test_times_as_slurm_writes_them_are_taken(time: str) -> None:
    assert sbatch_options(sbatch_script(replace(JOB, time=time)))["--time"] == time


def test_a_studys_tasks_reach_their_program_as_they_are(tmp_path: Path) -> None:
    for text in texts(50):
        if "\0" in text:
            continue
        study: Any = SimpleNamespace(path=text, runs_dir=f"runs {text}")
        runs: Any = [SimpleNamespace(levels={"objective": text, "lr": "1e-3"}, seed=seed) for seed in (3, 4)]
        script = _script(study, "study-cells", Path("/shared/runs"), runs).replace(
            'eval "exec ${TASKS', 'show() { printf \'%s\\0\' "$@"; }\neval "show ${TASKS'
        )
        done = subprocess.run(
            ["bash", "-u"], input=f"SLURM_ARRAY_TASK_ID=1\n{script}".encode(), cwd=tmp_path, capture_output=True
        )
        assert done.stderr == b"" and list(tmp_path.iterdir()) == []
        words = done.stdout.decode().split("\0")[4:-1]
        asked = ["--seeds", "4", "--only", f"objective={text}", "--only", "lr=1e-3"]
        assert words == [text, "--runs", f"runs {text}", *asked]
