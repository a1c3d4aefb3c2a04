"""Processes that end with those who started them, and nothing of them left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with(parent_pid: int) -> None:
    """SIGTERM for this process as soon as its parent is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Ends, after the block, every process that was started in it, by whomever: orphans come to this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    before = set(_descendants())
    try:
        yield
    finally:
        for _ in range(10):  # One that is killed may just have started another.
            left = [process for process in _descendants() if process not in before]
            if not left:
                break
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5.0)


def end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Ask it to end, then make it."""
    if process.poll() is not None:
        return
    process.terminate()
    deadline = time.monotonic() + grace_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _is_running(process)]


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
