"""A disk of a few MB for tests of full disks: a tmpfs, mounted where the tests may mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of its own at `directory`. Skips the test where mounting is not allowed."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},mode=755", "tmpfs", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("`mount` is not installed")
    if done.returncode:
        pytest.skip(f"a tmpfs of {num_bytes} bytes can't be mounted here; run the tests as root: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def resize(directory: Path, num_bytes: int) -> None:
    """Of one that is mounted, while it is in use."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(directory)], check=True)
