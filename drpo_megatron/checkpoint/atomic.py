"""Output directories that are whole or not there at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_directory(
    target: str | Path, *, num_bytes: int = 0, force: bool = False, source: Path | None = None
) -> Iterator[Path]:
    """A directory to fill. It becomes `target` when the block ends without error, and is removed when it doesn't.

    A killed process leaves a hidden `.<name>.writing-*` beside the target, which the next writer of the same target
    removes. A directory that is still being written is locked, so nobody removes it.

    Args:
        num_bytes: what will be written. Checked against the free disk first.
        force: replace an existing target, which stays until the new one is whole.
        source: what is read for it. It may not be the target, or lie in it: it would be lost.

    Raises: ValueError if `target` exists (unless `force`) or holds `source`, or the disk is too small, with both numbers.
    """
    target = Path(target)
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} can't be written while {source} is read from it; choose another directory")
    if target.exists() and not force:
        raise ValueError(f"{target} already exists; choose another directory, or --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(target)
    require_free_space(target.parent, num_bytes)
    scratch = target.parent / f".{target.name}.writing-{uuid.uuid4().hex}"
    scratch.mkdir()
    lock = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield scratch
        _replace(target, scratch)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def require_free_space(directory: Path, num_bytes: int) -> None:
    """ValueError when the disk of `directory` has less than `num_bytes` (and 1 % for file systems' own needs) free."""
    needed, available = num_bytes + num_bytes // 100, shutil.disk_usage(directory).free
    if needed > available:
        raise ValueError(
            f"{directory} has {available:,} bytes of disk free, but {needed:,} are needed; free some, or choose "
            "another disk"
        )


def remove_remains(target: Path) -> None:
    """Remove what killed writers of `target` left behind."""
    for remains in target.parent.glob(f".{target.name}.writing-*"):
        if not _is_being_written(remains):
            shutil.rmtree(remains, ignore_errors=True)


def _is_being_written(directory: Path) -> bool:
    """A living writer holds a lock on its directory; the kernel releases that of a dead one."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def _replace(target: Path, scratch: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    old = target.parent / f".{target.name}.writing-{uuid.uuid4().hex}"
    target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old)
