"""A reward function in a process that is killed when it takes too long: the one time limit that nothing evades."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

from drpo_megatron.rewards.base import RewardTimeout, WorkerDied
from drpo_megatron.rewards.imported import as_number, load_function
from drpo_megatron.types import Prompt

_STARTUP_S = 120.0
"""Importing the function's module may take long; it is not part of any response's time."""
_GRACE_S = 0.1
"""How long a process that closed its pipe may take to end by itself, so that its own exit code is known."""
_ORPHAN_S = 1.0
"""How much later than the parent would the worker ends itself."""
_MARK = "DRPO_REWARD_WORKER"
"""Environment variable of a worker and of all that it starts, whatever session or parent they choose."""
_marking = threading.Lock()
_KILL_ROUNDS = 20
"""Each kills all that are there; more than two only against those that fork without end."""


class WorkerReward:
    """The function at `package.module:function`, one call at a time in a worker process.

    A call that exceeds `timeout_s` raises RewardTimeout; its worker is killed. A worker that dies (os._exit, out of
    memory) makes its call raise RuntimeError. Either is replaced at the next call. The first worker starts at once, so
    that a wrong path is a ValueError here and not in the middle of a run. What the function raises, a call raises as
    RuntimeError, sys.exit() included. Processes that the function started end with their worker.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._worker: _Worker | None = _Worker(path, timeout_s)

    def __call__(self, response: str, answer: str, prompt: Prompt) -> float:
        if self._worker is None:
            self._worker = _Worker(self._path, self._timeout_s)
        try:
            return self._worker.ask((response, answer, prompt))
        except (TimeoutError, EOFError, BrokenPipeError, ConnectionResetError) as error:
            exit_code = self._worker.kill()
            self._worker = None
            if isinstance(error, TimeoutError):
                raise RewardTimeout(f"{self._path} took longer than timeout_s={self._timeout_s:g}") from None
            raise WorkerDied(f"the worker of {self._path} died with exit code {exit_code}") from error

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker = None


class _Worker:
    """The process and this end of its pipe."""

    def __init__(self, path: str, timeout_s: float) -> None:
        # Spawned, not forked: the parent may hold threads (Ray, torch), whose locks a fork would copy as they stand.
        context = multiprocessing.get_context("spawn")
        self._timeout_s = timeout_s
        self._connection, theirs = context.Pipe()
        self._mark = uuid.uuid4().hex
        self._process = context.Process(target=_serve, args=(theirs, path, timeout_s, self._mark), daemon=True)
        resource_tracker.ensure_running()  # It is this process's own, and must not carry the mark.
        with _marking:
            os.environ[_MARK] = self._mark
            self._process.start()
            del os.environ[_MARK]
        theirs.close()
        try:
            in_time = self._connection.poll(_STARTUP_S)
            late = f"reward path={path!r} could not be imported within {_STARTUP_S:g} s"
            problem = self._connection.recv() if in_time else late
        except EOFError:
            problem = f"reward path={path!r}: importing it ended the process"
        if problem is not None:
            self.kill()
            raise ValueError(problem)

    def ask(self, arguments: tuple[str, str, Prompt]) -> float:
        self._connection.send(arguments)
        if not self._connection.poll(self._timeout_s):
            raise TimeoutError
        reward, problem = self._connection.recv()
        if problem is not None:
            raise RuntimeError(problem)
        return reward

    def kill(self) -> int | None:
        """The exit code: the process's own if it had ended before."""
        self._process.join(_GRACE_S)
        self._process.kill()
        self._process.join()
        kill_marked(self._mark)
        self._connection.close()
        return self._process.exitcode


def kill_marked(mark: str) -> None:
    """Every other process of this machine that carries the mark, those that it starts meanwhile included."""
    for _ in range(_KILL_ROUNDS):
        found = list(_marked(mark))
        if not found:
            return
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> Iterator[int]:
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            if (entry / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                continue
        except OSError:  # It has ended, or is another user's.
            continue
        yield int(entry.name)


def _serve(connection: Connection, path: str, timeout_s: float, mark: str) -> None:
    """Answer None or a problem once the function is imported, then (reward, problem) to every call.

    Ends when the other end of the pipe does. Should the parent be killed while the function hangs, an alarm ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = load_function(path)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    pid = os.getpid()
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            break
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_S)
        try:
            reward, problem = as_number(function(*arguments)), None
        except BaseException as error:  # Whatever the user's function raises, sys.exit() too: the caller reports it.
            reward, problem = 0.0, f"{type(error).__name__}: {error}"
        if os.getpid() != pid:
            os._exit(0)  # A child that the function forked and that came back: there is one answer a call.
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send((reward, problem))
    kill_marked(mark)
