"""A process that dies ends the run soon, with one error that names it; and no ending leaves processes behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.orchestration import command

# Engines draw while ranks train, so that whatever dies or is interrupted has company at work.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(command.ROOT), "OMP_NUM_THREADS": "1"}
_LONG = {
    "run": {"run_dir": "run", "num_steps": 100_000},
    "rollout": {"max_response_tokens": 6, "max_staleness": 1},
}


def process_id(directory: Path, log: str) -> int:
    found = re.search(r"pid (\d+)", (directory / "run" / "logs" / f"{log}.log").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("log", "name"),
    [("trainer-rank1", "trainer rank 1"), pytest.param("engine-0", "engine 0", marks=pytest.mark.slow)],
)
def test_a_killed_process_is_named_within_a_minute(tmp_path: Path, log: str, name: str) -> None:
    parallel = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}
    command.prepare(tmp_path, parallel=parallel, **_LONG)
    process = command.start(tmp_path, "train", "run.yaml")
    command.wait_for_step(process, tmp_path, 3)
    processes = command.descendants(process)
    killed = process_id(tmp_path, log)
    started = time.monotonic()
    os.kill(killed, signal.SIGKILL)
    code, output = command.finish(process, tmp_path, timeout_s=60)
    assert time.monotonic() - started < 60
    assert code == 1
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in output
    assert errors[0].startswith(f"error: {name} (host ") and f"pid {killed}) died" in errors[0]
    assert f"logs/{log}.log" in output
    assert "resume with: drpo-megatron train --resume run" in output
    assert command.still_running(processes, within_s=10) == []


def test_an_interrupted_run_leaves_no_process(tmp_path: Path) -> None:
    command.prepare(tmp_path, **_LONG)
    process = command.start(tmp_path, "train", "run.yaml")
    command.wait_for_step(process, tmp_path, 3)
    processes = command.descendants(process)
    assert len(processes) > 3
    arguments = [sys.executable, "-m", "drpo_megatron.cli", "train", "--resume", "run"]
    second = subprocess.run(arguments, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert second.returncode == 2
    assert f"run is in use by process {process.pid} on {os.uname().nodename}, since " in second.stderr
    os.killpg(process.pid, signal.SIGINT)  # What a terminal does on Ctrl-C.
    code, output = command.finish(process, tmp_path, timeout_s=30)
    assert code == 130
    assert "Traceback" not in output and "resume with: drpo-megatron train --resume run" in output
    assert command.still_running(processes, within_s=10) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_saves_the_step_it_is_at(tmp_path: Path, number: signal.Signals) -> None:
    command.prepare(tmp_path, **_LONG, checkpoint={"every": 0})
    process = command.start(tmp_path, "train", "run.yaml")
    command.wait_for_step(process, tmp_path, 2)
    processes = command.descendants(process)
    process.send_signal(number)
    process.send_signal(number)  # A scheduler may say it twice.
    code, output = command.finish(process, tmp_path, timeout_s=300)
    assert code == 75
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    last = command.metrics(tmp_path / "run")[-1]["step"]
    assert saved.name == f"step_{last:06d}" and f"stopped after step {last}: {number.name} received" in output
    assert "Traceback" not in output and "resume with: drpo-megatron train --resume run" in output
    assert command.still_running(processes, within_s=30) == []


@pytest.mark.slow
def test_a_killed_driver_takes_its_actors_with_it(tmp_path: Path) -> None:
    command.prepare(tmp_path, **_LONG)
    process = command.start(tmp_path, "train", "run.yaml")
    command.wait_for_step(process, tmp_path, 1)
    actors = [p for p in command.descendants(process) if p.cmdline()[0].startswith(("ray::Trainer", "ray::Engine"))]
    assert len(actors) == 2
    process.kill()
    process.wait()
    assert command.still_running(actors, within_s=10) == []
