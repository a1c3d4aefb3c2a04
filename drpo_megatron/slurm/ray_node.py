"""Run by the job on every node: its part of the job's Ray.

Nothing is a constant: the head listens on a port that the system chose and writes its address to the directory of the
job's start, where the other nodes wait for it. Node names are Slurm's, so that errors name what `sinfo` shows.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from drpo_megatron.files import write_text
from drpo_megatron.orchestration.scratch import ray_directory

ADDRESS_FILE = "ray_address"
_UP_FILE = "ray_current_cluster"
"""Ray writes its address there, below its temporary directory, when it is up."""
_LOGS = "session_latest/logs"
"""Kept when Ray ended by itself: `ray start` says that it failed, these say why."""
_PATIENT = {"RAY_raylet_start_wait_time_s": "60"}
"""Twice Ray's own patience, for a Python that comes from a busy shared file system."""
_END_S = 20.0
"""How long Ray may take to end before it is killed."""


def run_node(job_dir: Path, node: str, *, is_head: bool, num_cpus: int, timeout_s: float) -> int:
    """Start Ray here and stay until it ends, or until SIGUSR2. Returns 0 after SIGUSR2, otherwise 1.

    SIGTERM, which Slurm sends to every process of a job that it is going to preempt, is not answered: the run needs its
    Ray until it has saved a checkpoint.

    Raises: ValueError when another node's head does not start in time.
    """
    ended = _on_signals()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--node-name={node}", f"--node-ip-address={address_of(job_dir, node)}", f"--num-cpus={num_cpus}"]
    if is_head:
        command += ["--head", "--port=0", "--include-dashboard=false"]
    elif address := _read(job_dir / ADDRESS_FILE, ended, timeout_s):
        command.append(f"--address={address}")
    else:
        raise ValueError(f"Ray's head has not started: there is no {job_dir / ADDRESS_FILE}")
    # Ray ends when a helper takes more than 15 s to start (github.com/ray-project/ray/issues/65983). The next start finds
    # the helper's files in memory.
    deadline = time.monotonic() + timeout_s
    for start in count():
        with _started(command) as (ray, scratch):
            came_up = _serve(ray, scratch, ended, job_dir if is_head else None, timeout_s)
            if ended():
                return 0
            with suppress(OSError):
                shutil.copytree(scratch / _LOGS, job_dir / f"ray-{node}.{start}", ignore_dangling_symlinks=True)
        if came_up or time.monotonic() > deadline:
            break
    return 1


def _serve(
    ray: subprocess.Popen[bytes], scratch: Path, ended: Callable[[], bool], publish_in: Path | None, timeout_s: float
) -> bool:
    """Wait until Ray is up, then until it ends, or until `ended`. Whether it was up."""
    address = _read(scratch / _UP_FILE, lambda: ended() or ray.poll() is not None, timeout_s)
    if address and publish_in:
        write_text(publish_in / ADDRESS_FILE, address)
    while address and ray.poll() is None and not ended():
        time.sleep(0.5)
    return bool(address)


def address_of(job_dir: Path, node: str) -> str:
    """The IP address at which Slurm reaches the node, from what `scontrol show node --oneliner` printed."""
    for line in (job_dir / "nodes").read_text(encoding="utf-8").splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if fields.get("NodeName") == node:
            return socket.gethostbyname(fields["NodeAddr"])
    raise ValueError(f"{job_dir / 'nodes'} doesn't list this node, {node}")


def _on_signals() -> Callable[[], bool]:
    """Whether SIGUSR2 has come. The warnings are taken note of, and not ignored: Ray would inherit that."""
    came: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: came.append(number))
    return lambda: signal.SIGUSR2 in came


@contextmanager
def _started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Ray, and its temporary directory on the node's own disk; both end with the block."""
    with ray_directory() as scratch:
        # In a session of its own, so that signals to the job's processes don't reach it.
        ray = subprocess.Popen([*command, f"--temp-dir={scratch}"], start_new_session=True, env=os.environ | _PATIENT)
        try:
            yield ray, scratch
        finally:
            ray.terminate()
            with suppress(subprocess.TimeoutExpired):
                ray.wait(_END_S)
            with suppress(ProcessLookupError):
                os.killpg(ray.pid, signal.SIGKILL)
            ray.wait()


def _read(file: Path, is_over: Callable[[], bool], timeout_s: float) -> str:
    """What is in the file as soon as there is something; nothing when it is over before, or late."""
    deadline = time.monotonic() + timeout_s
    while not (text := file.read_text(encoding="utf-8").strip() if file.exists() else ""):
        if is_over() or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    return text
