"""One process a run directory: a second one is refused by name, and what a dead one left is taken over by one only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drpo_megatron.orchestration.run_lock import LOCK_FILE, RunLock

ROOT = Path(__file__).parents[2]
_HOLD = """
import sys, time
from pathlib import Path
from drpo_megatron.orchestration.run_lock import RunLock
try:
    lock = RunLock.take(Path(sys.argv[1]), lambda text: None, stale_s=2.0, beat_s=0.1)
except ValueError as error:
    sys.exit(f"refused: {error}")
print("held", flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""
OTHER_MACHINE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""A namespace in which process ids count anew: what another container, or another machine, has in common with it."""


def hold(directory: Path, seconds: float = 600.0, within: list[str] | None = None) -> subprocess.Popen[str]:
    command = [*(within or []), sys.executable, "-c", _HOLD, str(directory), str(seconds)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def is_held(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path)
    assert is_held(process)
    yield process
    process.kill()
    process.communicate()


def take(directory: Path) -> RunLock:
    return RunLock.take(directory, lambda text: None, stale_s=2.0, beat_s=0.1)


def test_a_second_process_is_refused_by_name_host_and_time(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    expected = rf"{re.escape(str(tmp_path))} is in use by process {holder.pid} on {os.uname().nodename}, since 20\d\d-"
    with pytest.raises(ValueError, match=expected):
        take(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # It lives, and gives no sign of life.
    time.sleep(0.5)
    with pytest.raises(ValueError, match=expected):
        take(tmp_path)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).exists()
    lock = take(tmp_path)
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_id_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """After a restart ids are given again: the time at which the process began tells them apart."""
    file = tmp_path / LOCK_FILE
    fields = json.loads(file.read_text())
    holder.kill()
    holder.wait()
    file.write_text(json.dumps(fields | {"pid": os.getpid()}))
    take(tmp_path).release()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="`unshare` is not installed")
def test_on_another_machine_a_sign_of_life_is_waited_for(tmp_path: Path) -> None:
    process = hold(tmp_path, within=OTHER_MACHINE)
    if not is_held(process):
        pytest.skip(f"namespaces are not allowed here; run the tests as root: {process.communicate()[1].strip()}")
    said: list[str] = []
    with pytest.raises(ValueError, match="is in use by process"):
        RunLock.take(tmp_path, said.append, stale_s=30.0)
    assert "waiting up to 30 s for a sign of life" in said[0]
    process.kill()
    process.communicate()
    lock = take(tmp_path)  # Its beat stands still.
    lock.check()
    lock.release()


def test_of_many_that_find_a_dead_one_exactly_one_has_it(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    crowd = [hold(tmp_path) for _ in range(6)]
    won = [is_held(process) for process in crowd]  # A refused one ends, and with it its output.
    for process in crowd:
        process.kill()
    errors = [process.communicate()[1] for process in crowd]
    assert sum(won) == 1
    winner = crowd[won.index(True)].pid
    assert all(f"process {winner} on" in error for error, has in zip(errors, won, strict=True) if not has)


def test_one_whose_lock_was_taken_while_it_was_frozen_is_told_so(tmp_path: Path) -> None:
    lock = take(tmp_path)
    file = tmp_path / LOCK_FILE
    theirs = json.loads(file.read_text()) | {"token": "another", "host": "n2", "pid": 7, "beat": 0}
    scratch = tmp_path / "scratch"
    scratch.write_text(json.dumps(theirs))
    scratch.rename(file)
    with pytest.raises(ValueError, match="no longer this process's .* is held by process 7 on n2"):
        lock.check()
    time.sleep(0.5)
    lock.release()
    assert json.loads(file.read_text()) == theirs, "neither a beat nor the end of the first touches the second's"
