"""A job of a real Slurm trains over two nodes, and goes on after a warning and after the death of a node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration import command
from tests.slurm.cluster import Slurm, missing, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")]

NUM_STEPS = 20
TIMEOUT_S = 1200.0


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    with Slurm(3) as cluster:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, cluster.environment[name])
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # The nodes' addresses are 127.0.0.x.
        yield cluster


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that don't tell the time."""
    timing = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in command.metrics(run_dir)]


def run(directory: Path, *arguments: str) -> str:
    """Output of the command."""
    code, output = command.finish(command.start(directory, *arguments), directory, TIMEOUT_S)
    assert code == 0, output
    return output


def submit(directory: Path, run_dir: str) -> str:
    """The job's number."""
    output = run(directory, "slurm", "submit", "run.yaml", f"run.run_dir={run_dir}", "--nodes", "2", "--assume-shared")
    match = re.search(r"job (\d+) submitted", output)
    assert match is not None, output
    return match[1]


def wait_for_step(slurm: Slurm, job: str, run_dir: Path, step: int) -> None:
    def has_come() -> bool:
        state = slurm.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{text(run_dir, job)}"
        return any(row["step"] >= step for row in command.metrics(run_dir))

    wait_until(has_come, f"step {step} of job {job}", TIMEOUT_S)


def wait_for_end(slurm: Slurm, job: str, run_dir: Path) -> dict[str, str]:
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(lambda: slurm.job(job)["JobState"] in ended, f"the end of job {job}", TIMEOUT_S)
    last = slurm.job(job)
    assert last["JobState"] == "COMPLETED", text(run_dir, job)
    return last


def text(run_dir: Path, job: str) -> str:
    file = run_dir / "slurm" / f"{job}.out"
    return file.read_text(errors="replace") if file.exists() else "(the job wrote nothing)"


def test_a_job_survives_a_warning_and_the_death_of_a_node_and_ends_as_if_nothing_had_been(
    slurm: Slurm, tmp_path: Path
) -> None:
    # Two ranks that do nothing without each other: tensor parallel over two nodes.
    parallel = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}
    sections = {
        "run": {"num_steps": NUM_STEPS},
        "checkpoint": {"every": 4},
        "cluster": {"startup_timeout_s": TIMEOUT_S},
    }
    command.prepare(tmp_path, parallel=parallel, **sections)
    run_dir = tmp_path / "job"
    job = submit(tmp_path, "job")

    wait_for_step(slurm, job, run_dir, 2)
    slurm.output("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue after the warning", TIMEOUT_S)
    stopped = re.search(r"stopped after step (\d+): SIGUSR1 received", text(run_dir, job))
    assert stopped is not None and (run_dir / "checkpoints" / f"step_{int(stopped[1]):06d}").is_dir()

    wait_for_step(slurm, job, run_dir, int(stopped[1]) + 2)
    assert slurm.job(job)["NodeList"] == "n[1-2]"
    slurm.kill_node("n2")
    last = wait_for_end(slurm, job, run_dir)
    assert last["Restarts"] == "2" and last["NodeList"] == "n[1,3]"

    output = text(run_dir, job)
    assert "requeueing: told to stop by USR1" in output
    assert "error: machine n2 (127.0.0.3) left the Ray cluster, and with it " in output
    assert len(re.findall(r"continuing \S+ after step \d+", output)) == 2

    run(tmp_path, "train", "run.yaml", "run.run_dir=uninterrupted")  # On this machine, without Slurm.
    assert numbers(run_dir) == numbers(tmp_path / "uninterrupted")
