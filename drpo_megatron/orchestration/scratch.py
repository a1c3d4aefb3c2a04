"""Temporary directories of Ray: this user's alone, and removed by the next start when their owner was killed.

Ray lets everybody write to the directory that it is given, so it is given one inside of another that is closed.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = re.compile(r"drpo-(\d+)-\w+")
_MAX_LENGTH = 12
"""Of the parent: with what Ray and we add, paths of its sockets have to stay within 107 characters."""


@contextmanager
def ray_directory() -> Iterator[Path]:
    """A directory for Ray, on this machine's own disk. Gone after the block."""
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _MAX_LENGTH:
        parent = Path("/tmp")
    remove_abandoned(parent)
    closed = Path(tempfile.mkdtemp(prefix=f"drpo-{os.getpid()}-", dir=parent))  # Mode 0700.
    lock = os.open(closed, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        inner = closed / "r"
        inner.mkdir()
        yield inner
    finally:
        shutil.rmtree(closed, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove this user's directories whose owner is gone: it holds a lock as long as it lives, and has its pid in the name."""
    for path in parent.glob("drpo-*"):
        with suppress(OSError):  # Somebody else removes it, too.
            if _NAME.fullmatch(path.name) and path.lstat().st_uid == os.getuid() and not path.is_symlink():
                _remove_unless_locked(path)


def _remove_unless_locked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        # Between mkdtemp and its lock a directory is empty, and has a living owner.
        if any(path.iterdir()) or not _is_alive(int(path.name.split("-")[1])):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _is_alive(pid: int) -> bool:
    return Path("/proc", str(pid)).exists()
