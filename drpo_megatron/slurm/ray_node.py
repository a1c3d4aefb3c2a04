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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADDRESS_FILE = "ray_address"
_LOGS = "session_latest/logs"
"""Below Ray's temporary directory. Kept when Ray ended by itself: `ray start` says that it failed, its logs say why."""
_AGENT_PORTS = (
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)
"""Ports of Ray's helper processes. Ray would choose them itself, but then ends when a helper takes more than 15 s to start
(github.com/ray-project/ray/issues/65983), as on a busy shared file system."""
_PATIENT = {"RAY_raylet_start_wait_time_s": "300"}
"""Ray's own 30 s are too few where Python comes from a busy shared file system."""
_END_S = 20.0
"""How long Ray may take to end before it is killed."""


def run_node(job_dir: Path, node: str, *, is_head: bool, num_cpus: int, timeout_s: float) -> int:
    """Start Ray here and stay until it ends, or until SIGUSR2. Returns the exit code.

    SIGTERM, which Slurm sends to every process of a job that it is going to preempt, is not answered: the run needs its
    Ray until it has saved a checkpoint.

    Raises: ValueError when the head does not start in time.
    """
    ended = _on_signals()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    command += [f"--node-name={node}", f"--node-ip-address={address_of(job_dir, node)}", f"--num-cpus={num_cpus}"]
    command += [f"--{option}={port}" for option, port in zip(_AGENT_PORTS, _free_ports(), strict=True)]
    with _temporary_directory() as scratch:
        command.append(f"--temp-dir={scratch}")
        if is_head:
            command += ["--head", "--port=0", "--include-dashboard=false"]
        else:
            command.append(f"--address={_read(job_dir / ADDRESS_FILE, ended, timeout_s)}")
        # In a session of its own, so that signals to the job's processes don't reach it.
        ray = subprocess.Popen(command, start_new_session=True, env=os.environ | _PATIENT)
        try:
            if is_head:
                address = _read(scratch / "ray_current_cluster", lambda: ended() or ray.poll() is not None, timeout_s)
                _publish(address, job_dir)
            while ray.poll() is None and not ended():
                time.sleep(0.5)
            return 0 if ended() else ray.returncode
        finally:
            _end(ray)
            if not ended() and (scratch / _LOGS).is_dir():
                shutil.copytree(scratch / _LOGS, job_dir / f"ray-{node}", ignore_dangling_symlinks=True)


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
def _temporary_directory() -> Iterator[Path]:
    """On the node's own disk. Short: Ray's socket paths have to stay within 107 characters."""
    path = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _read(file: Path, is_over: Callable[[], bool], timeout_s: float) -> str:
    deadline = time.monotonic() + timeout_s
    while not (text := file.read_text(encoding="utf-8").strip() if file.exists() else ""):
        if is_over() or time.monotonic() > deadline:
            raise ValueError(f"Ray's head did not start: there is no {file}")
        time.sleep(0.5)
    return text


def _free_ports() -> list[int]:
    sockets = [socket.socket() for _ in _AGENT_PORTS]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _publish(address: str, job_dir: Path) -> None:
    scratch = job_dir / f".{ADDRESS_FILE}"
    scratch.write_text(address, encoding="utf-8")
    scratch.rename(job_dir / ADDRESS_FILE)


def _end(ray: subprocess.Popen[bytes]) -> None:
    ray.terminate()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)
    ray.wait()
