"""A signal at any moment of a run ends it with exit code 75 and something to continue from; so does what follows.

One run is told to stop in its start-up, warm-up, first evaluation, and in the export of its model, and ends as one
that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.orchestration import command

_REWARD = """
import os, time

def share_of_even_tokens(response, answer, prompt):
    while os.path.exists("hold"):
        time.sleep(0.05)
    words = response.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / len(words) if words else 0.0
"""
_SECTIONS = {
    "run": {"run_dir": "run", "num_steps": 1},
    "warmup": {"data": "warmup.jsonl", "num_steps": 40, "sequences_per_step": 4, "optimizer": {"lr": 1e-3}},
    "reward": {"name": "import", "path": "my_rewards:share_of_even_tokens", "timeout_s": 300},
    "rollout": {"max_response_tokens": 4},
}


def prepare(directory: Path) -> None:
    command.prepare(directory, **_SECTIONS)
    (directory / "my_rewards.py").write_text(_REWARD)


def wait_for(text: str, process: subprocess.Popen[str], directory: Path, timeout_s: float = 300) -> None:
    """Until the run has said it."""
    deadline = time.monotonic() + timeout_s
    while text not in (said := (directory / "output.txt").read_text()):
        assert process.poll() is None, said
        assert time.monotonic() < deadline, f"{text!r} was not said within {timeout_s} s:\n{said}"
        time.sleep(0.05)


def pid_of(directory: Path, log: str) -> int:
    """Of the latest start."""
    return int(re.findall(r"pid (\d+)", (directory / "run" / "logs" / f"{log}.log").read_text())[-1])


@pytest.mark.slow
def test_a_run_that_is_stopped_at_any_moment_ends_as_one_that_was_not(tmp_path: Path) -> None:
    directory, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    for place in (directory, undisturbed):
        place.mkdir()
        prepare(place)
    code, output = command.run(undisturbed, "train", "run.yaml")
    assert code == 0, output

    def stopped(process: subprocess.Popen[str], name: str) -> str:
        processes = command.descendants(process) if process.poll() is None else []
        code, output = command.finish(process, directory, timeout_s=300)
        assert code == 75, output
        assert name in output and "Traceback" not in output and "train --resume run" in output
        assert command.still_running(processes, within_s=30) == []
        return output

    process = command.start(
        directory, "train", "run.yaml"
    )  # 1. In the start-up, as `timeout` does: to the whole group.
    wait_for("starting", process, directory)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGTERM)
    stopped(process, "SIGTERM")

    process = command.start(directory, "train", "--resume", "run")  # 2. In the warm-up.
    wait_for("warm-up step 1/", process, directory)
    os.killpg(process.pid, signal.SIGUSR1)
    output = stopped(process, "SIGUSR1")
    [done] = re.findall(r"stopped after step (\d+) of the warm-up", output)
    assert 1 <= int(done) < 40
    assert [path.name for path in (directory / "run" / "checkpoints").iterdir()] == ["step_000000"]

    (directory / "hold").touch()
    process = command.start(directory, "train", "--resume", "run")  # 3. In the evaluation before the first step.
    wait_for("warm-up step 40/40", process, directory)
    assert f"continuing run after step {done} of the warm-up" in (directory / "output.txt").read_text()
    assert "warm-up step 1/" not in (directory / "output.txt").read_text()
    time.sleep(1)
    process.send_signal(signal.SIGHUP)
    (directory / "hold").unlink()
    assert "stopped after step 0" in stopped(process, "SIGHUP")

    process = command.start(directory, "train", "--resume", "run")  # 4. In the export.
    wait_for("all processes are up", process, directory)
    newest = directory / "run" / "checkpoints" / "step_000001"
    while not newest.exists():
        assert process.poll() is None, (directory / "output.txt").read_text()
        (directory / "hold").touch() if command.metrics(directory / "run")[-1]["step"] == 1 else None
        time.sleep(0.02)
    (directory / "hold").touch()
    [row] = [row for row in command.metrics(directory / "run") if row["step"] == 1]  # Logged and saved, not evaluated.
    rank = pid_of(directory, "trainer-rank0")
    os.kill(rank, signal.SIGSTOP)
    (directory / "hold").unlink()
    wait_for("writing the trained model", process, directory)
    process.send_signal(signal.SIGTERM)
    stopped(process, "SIGTERM")
    run = directory / "run"
    assert not (run / "hf").exists() and not (run / "summary.json").exists()

    code, output = command.run(directory, "train", "--resume", "run")
    assert code == 0, output
    assert "step 1/" not in output, "nothing is trained again"
    assert (
        json.loads((run / "summary.json").read_text())["heldout_after"] == command.metrics(run)[-1]["eval/reward/mean"]
    )
    code, output = command.run(directory, "train", "--resume", "run")
    assert code == 2 and "is complete" in output
    expected, rows = command.metrics(undisturbed / "run"), command.metrics(run)
    for row, other in zip(expected, rows, strict=True):
        timeless = {name for name in row if not name.startswith(("time/", "throughput/", "memory/"))}
        assert {name: row[name] for name in timeless} == {name: other[name] for name in timeless}
    weights, others = (load_file(place / "run" / "hf" / "model.safetensors") for place in (undisturbed, directory))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert sorted(path.name for path in run.glob(".*")) == [] and not (run / "lock.json").exists()
