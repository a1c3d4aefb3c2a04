"""The one writer of files and directories: whatever ends it, what is left is the old one or the new one, whole.

    write_text(path, text)
    with writing(path) as file: ...            a file that is made piece by piece
    flush_tree(scratch); put_in_place(scratch, target)        a directory

Everything is written under a hidden name beside its target, flushed to the disk, and renamed; then the directory that
holds the name is flushed, too. A killed process leaves a hidden `.<name>.writing-*`, which the next writer of the same
target removes. One that is still being written is locked, so nobody removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2(2): two names swap what they stand for, at once."""
_AT_FDCWD = -100
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What an OSError says of a full disk, or a quota that is used up."""


class CannotWrite(OSError):
    """The system's reason why a file or directory can't be written, in one line for the user."""

    @classmethod
    def because(cls, path: str | os.PathLike[str], error: OSError) -> CannotWrite:
        return cls(error.errno, f"can't write {os.fspath(path)}: {_reason(path, error)}")

    def __str__(self) -> str:
        return str(self.args[1])


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the block that is about `path`, or names no other file, becomes a CannotWrite."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        if error.filename is not None and Path(path).name not in os.fsdecode(error.filename):
            raise
        raise CannotWrite.because(path, error) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The whole text as UTF-8. Raises CannotWrite; the old file stays then."""
    with writing(path) as file:
        file.write(text)


@contextmanager
def writing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A new file (`w`: UTF-8 text, `wb`: bytes) that takes the place of `path` when the block ends without an error.

    Raises: CannotWrite when the disk is full, read-only or not ours; the old file stays then.
    """
    target = Path(path)
    with explained(target):
        remove_remains(target)
        scratch = scratch_name(target)
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
                lock(descriptor)
                yield file
                file.flush()
                os.fsync(descriptor)
                os.replace(scratch, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(scratch)
            raise
        flush(target.parent)


def put_in_place(scratch: Path, target: Path) -> None:
    """Rename a directory that is flushed. An old `target` is replaced at once, and removed afterwards.

    Where the file system can't swap two names (NFS), the old one stands aside for a moment; `remove_remains` brings it
    back if that is all there is.
    """
    if not target.exists():
        os.rename(scratch, target)
        flush(target.parent)
        return
    if _exchange(scratch, target):
        old = scratch
    else:
        old = _aside(target)
        os.rename(target, old)
        os.rename(scratch, target)
    flush(target.parent)
    shutil.rmtree(old)


def remove_directory(directory: Path) -> None:
    """Under a hidden name, so that nobody takes half of it for the whole."""
    hidden = scratch_name(directory)
    os.rename(directory, hidden)
    shutil.rmtree(hidden)


def scratch_name(target: Path) -> Path:
    return target.parent / f".{target.name}.writing-{secrets.token_hex(8)}"


def remove_remains(target: Path) -> None:
    """Remove what killed writers of `target` left behind."""
    if (aside := _aside(target)).exists():
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)
    prefix = f".{target.name}.writing-"
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(prefix)]
    for remains in found:
        if _is_being_written(remains):
            continue
        if remains.is_dir():
            shutil.rmtree(remains, ignore_errors=True)
        else:
            remains.unlink(missing_ok=True)


def lock(descriptor: int) -> None:
    """Until it is closed. Without effect on a file system that has no locks."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flush(path: Path) -> None:
    """To the disk: a file's contents, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Some file systems can't for a directory.
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Every file in it, then every directory, the innermost first."""
    for parent, _, names in os.walk(directory, topdown=False):
        for name in names:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                flush(path)
        flush(Path(parent))


def require_free_space(directory: Path, num_bytes: int) -> None:
    """ValueError when the disk of `directory` has less than `num_bytes` (and 1 % for file systems' own needs) free."""
    needed, available = num_bytes + num_bytes // 100, shutil.disk_usage(directory).free
    if needed > available:
        raise ValueError(
            f"{directory} has {available:,} bytes of disk free, but {needed:,} are needed; free some, or choose "
            "another disk"
        )


def _is_being_written(path: Path) -> bool:
    """A living writer holds a lock on it; the kernel releases that of a dead one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True  # Its writer was just done.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return True
    finally:
        os.close(descriptor)
    return False


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once. False where the kernel, the C library or the file system can't."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _reason(path: str | os.PathLike[str], error: OSError) -> str:
    text = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return f"{text} ({_free(Path(path))} bytes are free); free some, or choose another disk"
    if error.errno == errno.EFBIG:
        return f"{text}: a limit of this process (ulimit -f) or of the file system"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{text}; make it writable, or choose another directory"
    return text


def _free(path: Path) -> str:
    for parent in path.absolute().parents:
        with suppress(OSError):
            return f"{shutil.disk_usage(parent).free:,}"
    return "no"
