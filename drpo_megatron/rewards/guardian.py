"""Ends reward workers and all that they started, also after the process that owns them was killed.

Workers carry a mark in their environment, which whatever they start inherits, in whatever session and under whatever
parent. A guardian is a process that waits for its pipe to close, which the kernel does when the owner ends in any way,
and then kills all processes with the mark. It is run by its path and imports nothing but this:

    python guardian.py MARK FD
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

MARK = "DRPO_REWARD_WORKER"
"""Environment variable of a worker and of all that it starts."""
_KILL_ROUNDS = 20
"""Each kills all that are there; more than two only against those that fork without end."""


def kill_marked(mark: str, sessions: Iterable[int] = ()) -> None:
    """Every other process of this machine whose mark begins with `mark`, and those that stand in the session of one that
    leads it, or in one of `sessions`: with those that they start meanwhile."""
    known = set(sessions)
    for _ in range(_KILL_ROUNDS):
        found = list(_found(mark, known))
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _found(mark: str, sessions: set[int]) -> Iterator[int]:
    """Adds to `sessions` those that are led by what it finds."""
    wanted = f"{MARK}={mark}".encode()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                state, _, _, its_session = file.read().rpartition(b")")[2].split()[:4]
            with open(f"/proc/{entry}/environ", "rb") as file:
                is_marked = any(variable.startswith(wanted) for variable in file.read().split(b"\0"))
        except OSError:  # It has ended, or is another user's.
            continue
        if state in (b"Z", b"X") or not (is_marked or int(its_session) in sessions):
            continue
        if is_marked and its_session == entry.encode():
            sessions.add(int(entry))
        yield int(entry)


def main() -> None:
    mark, pipe = sys.argv[1], int(sys.argv[2])
    if os.fork():
        os._exit(0)  # Nobody's child: what ends its parent's children doesn't end it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(pipe, 1):
        pass
    kill_marked(mark)
    os._exit(0)


if __name__ == "__main__":
    main()
