"""The process that calls a reward function. Started by `pool.py`, which ends it.

It says whether the function is async once that is imported, or what is wrong with it. Then it answers every
(number, responses) with (number, verdicts), or (number, what went wrong). Time limits of a plain function are the pool's:
it kills the process. An async function has several calls at a time, and its limits here. The number of the call that runs
just now is in `Place`: of the one that ended the process, or that keeps the loop for itself.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import socket
import struct
from collections.abc import Coroutine, Generator
from typing import Any

from drpo_megatron.rewards import channel, guardian
from drpo_megatron.rewards.base import Response, Verdict
from drpo_megatron.rewards.functions import RewardFunction, described

_NUMBER = struct.Struct("q")
NOBODY = -1

Answer = tuple[int, list[Verdict] | str]
TIMED_OUT = ""
"""In place of what went wrong: an async call took longer than its limit."""


class Place:
    """Memory that pool and worker share: the number of the call that runs just now."""

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, _NUMBER.size)

    @staticmethod
    def make() -> tuple[int, Place]:
        """A file for the worker to open it by, and the place."""
        file = os.memfd_create("reward-call")
        os.ftruncate(file, _NUMBER.size)
        place = Place(file)
        place.number = NOBODY
        return file, place

    @property
    def number(self) -> int:
        return _NUMBER.unpack_from(self._memory)[0]

    @number.setter
    def number(self, number: int) -> None:
        _NUMBER.pack_into(self._memory, 0, number)

    def close(self) -> None:
        self._memory.close()


def main(settings: dict[str, Any]) -> None:
    """`settings`: path, takes_batches, timeout_s, mark, and the file descriptors `connection` and `place`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's, who decides.
    connection = socket.socket(fileno=settings["connection"])
    try:
        function = RewardFunction(settings["path"], settings["takes_batches"])
    except ValueError as error:
        channel.send(connection, str(error))
        return
    channel.send(connection, function.is_async)
    place = Place(settings["place"])
    if function.is_async:
        asyncio.run(_AsyncCalls(function, connection, place, settings["timeout_s"]).serve())
    else:
        _serve(function, connection, place)
    guardian.kill_marked(settings["mark"], [os.getpid()])  # While it leads its session, which tells what is in there.
    os._exit(0)  # Threads of the user's do not keep it.


def _serve(function: RewardFunction, connection: socket.socket, place: Place) -> None:
    pid = os.getpid()
    while True:
        try:
            number, responses = channel.receive(connection)
        except (EOFError, OSError):
            return
        answer: Answer
        place.number = number
        try:
            answer = number, function(responses)
        except BaseException as error:  # Whatever the user's function raises, sys.exit() too: the scorer reports it.
            answer = number, described(error)
        if os.getpid() != pid:
            os._exit(0)  # A child that the function forked and that came back: there is one answer a call.
        channel.send(connection, answer)
        place.number = NOBODY


class _AsyncCalls:
    """Calls of an async function, side by side in one event loop."""

    def __init__(self, function: RewardFunction, connection: socket.socket, place: Place, timeout_s: float) -> None:
        self._function, self._connection, self._place, self._timeout_s = function, connection, place, timeout_s
        self._pid = os.getpid()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self) -> None:
        loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._connection, self._begin)
        await self._ended.wait()

    def _begin(self) -> None:
        try:
            number, responses = channel.receive(self._connection)
        except (EOFError, OSError):
            self._ended.set()
            return
        task = asyncio.create_task(self._answer(number, responses))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, responses: list[Response]) -> None:
        call = asyncio.create_task(self._call(number, responses))
        await asyncio.wait({call}, timeout=self._timeout_s)
        if call.done():
            answer: Answer = number, call.result()
        else:
            call.cancel()  # And not waited for: it may refuse.
            self._tasks.add(call)
            call.add_done_callback(self._tasks.discard)
            answer = number, TIMED_OUT
        channel.send(self._connection, answer)

    async def _call(self, number: int, responses: list[Response]) -> list[Verdict] | str:
        try:
            return await _Stepped(self._function.answer(responses), number, self._place)
        except BaseException as error:  # As in `_serve`; a SystemExit would end the loop.
            return described(error)
        finally:
            if os.getpid() != self._pid:
                os._exit(0)


class _Stepped:
    """An awaitable that does what its coroutine does, and leaves the call's number in `place` while that runs."""

    def __init__(self, coroutine: Coroutine[Any, Any, list[Verdict]], number: int, place: Place) -> None:
        self._coroutine, self._number, self._place = coroutine, number, place

    def __await__(self) -> Generator[Any, Any, list[Verdict]]:
        coroutine, sent, thrown = self._coroutine, None, None
        while True:
            self._place.number = self._number
            try:
                awaited = coroutine.send(sent) if thrown is None else coroutine.throw(thrown)
            except StopIteration as end:
                return end.value
            finally:
                self._place.number = NOBODY
            sent = thrown = None
            try:
                sent = yield awaited
            except BaseException as error:  # A cancellation, mostly: the coroutine's own affair.
                thrown = error
