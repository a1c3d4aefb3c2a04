"""What the machine lacks: a full disk, a reader of the output, a HOME, memory. Training goes on where it can."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import mounted, resize
from tests.orchestration import command

ROOT = Path(__file__).parents[2]
_SHORT = {"warmup": None, "rollout": {"max_response_tokens": 4}, "data": {"train": "train.jsonl", "heldout": None}}


def wait_until(condition: object, process: subprocess.Popen[str], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    assert callable(condition)
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 300_000) as disk:
        yield disk


@pytest.mark.slow
def test_training_goes_on_with_a_full_disk_and_without_a_reader(tmp_path: Path, small_disk: Path) -> None:
    """`train | head -1`, into a disk that is too small for a checkpoint until somebody frees some of it."""
    run = small_disk / "run"
    sections = {"run": {"run_dir": str(run), "num_steps": 100_000}, "checkpoint": {"every": 1}, **_SHORT}
    command.prepare(tmp_path, **sections)
    process = command.start(tmp_path, "train", "run.yaml", piped=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("run directory: ")
    process.stdout.close()
    goes_on = run / "logs" / "driver.log"
    wait_until(lambda: goes_on.exists() and "is not saved, and training goes on: " in goes_on.read_text(), process)
    resize(small_disk, 64 * 2**20)
    wait_until(lambda: list((run / "checkpoints").glob("step_*")), process)
    saved = min(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    assert saved > 1
    process.terminate()
    errors = process.stderr.read()
    assert process.wait(300) == 75, errors
    assert errors.splitlines() == [f"warning: standard output was closed; it goes on in {goes_on}"]
    said = goes_on.read_text()
    assert f"warning: step 1 is not saved, and training goes on: {run}/checkpoints/" in said or (
        "warning: step 1 is not saved, and training goes on: can't write " in said
    )
    assert "stopped after step" in said and "Traceback" not in said
    rows = command.metrics(run)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "no step's numbers are lost"


def test_a_last_checkpoint_without_room_fails_the_run_and_leaves_nothing_half_made(
    tmp_path: Path, small_disk: Path
) -> None:
    """Exit code 1: what was learnt is lost with the processes. The numbers of its steps are not."""
    run = small_disk / "run"
    sections = {"run": {"run_dir": str(run), "num_steps": 1}, "checkpoint": {"every": 100}, **_SHORT}
    command.prepare(tmp_path, **sections)
    code, output = command.run(tmp_path, "train", "run.yaml")
    assert code == 1 and "Traceback" not in output, output
    assert str(run / "checkpoints") in output and "free" in output, output
    assert f"train --resume {run}" in output
    assert [row["step"] for row in command.metrics(run)] == [1]
    left = [path.name for path in run.rglob("*") if path.name.startswith(("step_", "hf", "summary"))]
    assert left == [], left
    assert not [path for path in run.rglob("*") if ".writing-" in path.name]


@pytest.mark.slow
def test_a_machine_without_memory_is_named_in_one_line_and_a_home_that_is_none_needs_no_word(tmp_path: Path) -> None:
    """Ray ends a process when the machine's memory is used to a share, set to nearly nothing here; HOME is /proc."""
    command.prepare(tmp_path, run={"run_dir": "run", "num_steps": 100_000}, **_SHORT)
    variables = {"HOME": "/proc", "RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "200"}
    process = command.start(tmp_path, "train", "run.yaml", **variables)
    code, output = command.finish(process, tmp_path)
    assert code == 1, output
    [error] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert " died: Ray ended it because its machine runs out of memory (" in error and "used); put fewer" in error
    assert "Traceback" not in output and ".ray" not in output
    assert not os.path.exists("/proc/.ray")
