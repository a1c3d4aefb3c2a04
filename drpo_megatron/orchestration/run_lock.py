"""One process a run directory, across machines and on any file system.

`RUN_DIR/lock.json` names its holder: machine, process, and since when. Its `beat` is written anew every few seconds. On
the holder's machine the kernel knows whether it lives. From another machine the beat is watched: a lock whose beat
stands still for `STALE_S` is taken over. No clocks are compared, and no lock of a file system is relied on.

A holder that was suspended for so long finds its lock taken when it wakes up, and ends before its next checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from drpo_megatron.files import explained, write_text

LOCK_FILE = "lock.json"
BEAT_S = 5.0
STALE_S = 60.0
_LENGTH = 1024
"""Bytes of the file, filled up with spaces, so that a beat replaces the one before in one write."""


@dataclass(frozen=True, slots=True)
class Holder:
    token: str
    host: str
    pid: int
    boot_id: str
    """The kernel's, of this start of the machine, with the namespace that `pid` counts in (containers)."""
    started: float
    """When the process was created: pids are used again."""
    since: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        since, pid = time.strftime("%Y-%m-%d %H:%M:%S %z"), os.getpid()
        started = psutil.Process(pid).create_time()
        return cls(secrets.token_hex(16), socket.gethostname(), pid, _boot_id(), started, since)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def is_of_this_machine(self) -> bool:
        return self.boot_id == _boot_id()

    @property
    def is_running(self) -> bool:
        """Of one on this machine."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def text(self) -> str:
        return json.dumps(asdict(self)).ljust(_LENGTH - 1) + "\n"


class RunLock:
    """Held from `take` to `release`.

    Raises of `take`: ValueError that names the holder when another process has the directory.
    """

    def __init__(self, path: Path, holder: Holder, beat_s: float) -> None:
        self._path, self._holder = path, holder
        self._ended = threading.Event()
        self._lost_to: Holder | None = None
        self._thread = threading.Thread(target=self._beat, args=(beat_s,), name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls, directory: Path, say: Callable[[str], None], stale_s: float = STALE_S, beat_s: float = BEAT_S
    ) -> RunLock:
        path, mine = directory / LOCK_FILE, Holder.this_process()
        own = directory / f".{LOCK_FILE}.{mine.token}"
        with explained(path):
            write_text(own, mine.text())
        try:
            while not _create(own, path):
                holder = _read(path)
                if holder is not None and _replace_dead(own, path, holder, say, stale_s):
                    break
        finally:
            own.unlink(missing_ok=True)
        return cls(path, mine, beat_s)

    def check(self) -> None:
        """ValueError when another process took the lock, because this one gave no sign of life for so long."""
        holder = _read(self._path)
        if holder is None or holder.token != self._holder.token:
            who = str(holder) if holder else "nobody: lock.json was removed"
            raise ValueError(
                f"{self._path.parent} is no longer this process's ({self._holder.pid} on {self._holder.host}), which was "
                f"silent for too long: it is held by {who}"
            )

    def release(self) -> None:
        self._ended.set()
        self._thread.join()
        holder = _read(self._path)
        if holder is not None and holder.token == self._holder.token:
            self._path.unlink(missing_ok=True)

    def _beat(self, beat_s: float) -> None:
        holder = self._holder
        while not self._ended.wait(beat_s):
            holder = replace(holder, beat=holder.beat + 1)
            with suppress(OSError):
                _write_beat(self._path, holder)


def _create(own: Path, path: Path) -> bool:
    """Put `own` in place if there is no lock. A link is made by one of several at most, on network file systems, too."""
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        return _create_without_links(own, path)
    return True


def _create_without_links(own: Path, path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(own.read_text(encoding="utf-8"))
    return True


def _replace_dead(own: Path, path: Path, holder: Holder, say: Callable[[str], None], stale_s: float) -> bool:
    """Whether the lock is ours now. False: it changed hands meanwhile. ValueError when its holder lives."""
    if not _is_dead(path, holder, say, stale_s):
        raise ValueError(
            f"{path.parent} is in use by {holder}; wait for it, or end it there (if no such process exists: rm {path})"
        )
    with _one_at_a_time(path):
        again = _read(path)
        if again is None or again.token != holder.token or again.beat != holder.beat and not holder.is_of_this_machine:
            return False
        os.replace(own, path)
    time.sleep(0.05)
    again = _read(path)
    return again is not None and again.token in own.name


def _is_dead(path: Path, holder: Holder, say: Callable[[str], None], stale_s: float) -> bool:
    if holder.is_of_this_machine:
        return not holder.is_running
    say(f"{path.parent} is held by {holder}: waiting up to {stale_s:g} s for a sign of life of it ...")
    deadline = time.monotonic() + stale_s
    while time.monotonic() < deadline:
        time.sleep(min(1.0, stale_s / 10))
        if _read(path) != holder:
            return False
    return True


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Among those who take over a lock, where the file system has locks; elsewhere the look afterwards has to do."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_beat(path: Path, holder: Holder) -> None:
    """Into the file that holds our name, and into no other that took its place meanwhile."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        found = _parsed(os.pread(descriptor, _LENGTH, 0))
        if found is not None and found.token == holder.token:
            os.pwrite(descriptor, holder.text().encode(), 0)
    finally:
        os.close(descriptor)


def _read(path: Path) -> Holder | None:
    """None when there is no lock. One that can't be read was cut off while it was made: its holder is nobody's."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return _parsed(content) or Holder(f"damaged-{len(content)}", "an unknown machine", 0, "", 0.0, "an unknown time")


def _parsed(content: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _boot_id() -> str:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + namespace
    except OSError:  # No Linux: the name of the machine has to do.
        return socket.gethostname()
