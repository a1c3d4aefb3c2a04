"""A reward function in a process that is killed when it takes too long: the one time limit that nothing evades."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

from drpo_megatron.rewards.base import RewardTimeout
from drpo_megatron.rewards.imported import load_function
from drpo_megatron.types import Prompt

_STARTUP_S = 120.0
"""Importing the function's module may take long; it is not part of any response's time."""


class WorkerReward:
    """The function at `package.module:function`, one call at a time in a worker process.

    A call that exceeds `timeout_s` raises RewardTimeout, and its worker is killed and replaced; a worker that dies
    (os.exit, out of memory) is replaced, too, and its call raises RuntimeError. The first worker starts at once, so a
    wrong path is a ValueError here and not in the middle of a run. Exceptions of the function are raised to the caller.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path, self._timeout_s = path, timeout_s
        self._start()

    def __call__(self, response: str, answer: str, prompt: Prompt) -> float:
        if self._process is None:
            self._start()
        self._connection.send((response, answer, prompt))
        if not self._connection.poll(self._timeout_s):
            self.close()
            raise RewardTimeout(f"{self._path} took longer than timeout_s={self._timeout_s:g}")
        return self._receive()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        # Spawned, not forked: the parent may hold threads (Ray, torch), whose locks a fork would copy as they stand.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: Any = context.Process(target=_serve, args=(theirs, self._path), daemon=True)
        self._process.start()
        theirs.close()
        if not self._connection.poll(_STARTUP_S):
            self.close()
            raise RewardTimeout(f"{self._path} could not be imported within {_STARTUP_S:g} s")
        try:
            self._receive()
        except ValueError:
            self.close()
            raise

    def _receive(self) -> Any:
        try:
            value, error = self._connection.recv()
        except EOFError:
            exit_code = self._process.join(1.0) or self._process.exitcode
            self.close()
            raise RuntimeError(f"the worker of {self._path} died with exit code {exit_code}") from None
        if error is not None:
            raise error
        return value


def _serve(connection: Connection, path: str) -> None:
    try:
        function = load_function(path)
    except ValueError as error:
        connection.send((None, ValueError(str(error))))
        return
    connection.send((None, None))
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (float(function(*arguments)), None)
        except Exception as error:  # The function is the user's; whatever it raises is reported by the caller.
            answer = (None, RuntimeError(f"{type(error).__name__}: {error}"))
        connection.send(answer)
