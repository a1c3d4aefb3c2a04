"""A reward function in many processes that are killed when they take too long: the one time limit that nothing evades.

    submit -> waiting calls -> worker processes -> futures

One thread does it all and waits for nothing but news: answers, deaths, time limits. Workers are started as calls have to
wait, and replaced when they are lost. A call that takes its worker with it fails; others that this worker had (an async
function has many) go to the next, first in line. Where nobody knows which of them it was, and it happens again, each goes
alone. A batch that fails is called again response by response, so that only what fails by itself is worth 0.
"""

from __future__ import annotations

import math
import os
import selectors
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from drpo_megatron.rewards.base import LostWorkers, Response, Verdict
from drpo_megatron.rewards.process import Output, WorkerProcess, end_all, start_guardian
from drpo_megatron.rewards.worker import TIMED_OUT, Answer

_STARTUP_S = 120.0
"""Importing the function's module may take long; it is not part of any response's time."""
_WAIT_S = 0.1
"""How long calls wait before further workers are started for them."""
_BLOCKED_S = 2.0
"""How much later than its limit an async call must have been answered; else the loop of its worker is blocked."""
_GRACE_S = 1.0
"""How long a process that closed its socket may take to end by itself, so that its own exit code is known."""
_LOOK_S = 0.5
"""How often to look for workers that ended while what they forked keeps their socket open."""
_MAX_STARTS = 3
"""In a row that failed, after which what waits for a worker fails."""
_MAX_LOST = 8
"""Workers that are lost before the first reward comes out, after which there is no point in going on."""


@dataclass(frozen=True, slots=True)
class PoolOptions:
    path: str
    """`package.module:function`."""
    timeout_s: float
    """Of a call."""
    num_workers: int | None = None
    """None: the cores that this process may use."""
    concurrency: int = 1
    """Calls of an async function at a time, over all workers."""
    batch_size: int | None = None
    """Responses a call, of those that are submitted together. None: the function takes one, not a list."""
    may_give_up: bool = True
    """When the first rewards all take their workers with them."""


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    responses: Sequence[Response]
    futures: Sequence[Future[Verdict]]
    since: float
    """When it began to wait."""
    num_lost: int = 0
    """Workers that ended with it and others in them, nobody knows for which."""

    @property
    def is_alone(self) -> bool:
        """No other call may be in its worker. The first loss may well have come from outside."""
        return self.num_lost > 1


class _Worker(WorkerProcess):
    def __init__(self, mark: str, settings: dict[str, Any], output: Output) -> None:
        super().__init__(mark, settings, output)
        self.calls: dict[int, tuple[_Call, float]] = {}
        """With the times at which they are overdue, by number."""


class WorkerPool:
    """Rewards of the function at `package.module:function`. Its first worker starts at once.

    Processes that the function starts end with their worker, and all end with this process, however that ends.

    Raises: ValueError, when the function can't be imported or called: here and not in the middle of a run.

    Example:
        pool = WorkerPool(PoolOptions("my_rewards:last_word", timeout_s=10))
        verdicts = [future.result() for future in pool.submit(responses)]
        pool.close()
    """

    def __init__(self, options: PoolOptions) -> None:
        self._options = options
        self._max_workers = options.num_workers or len(os.sched_getaffinity(0))
        self._is_async = False
        """Known when the first worker is ready."""
        self._mark = uuid.uuid4().hex
        self._lifeline = start_guardian(self._mark)
        self._workers: list[_Worker] = []
        self._submitted: deque[_Call] = deque()
        self._waiting: deque[_Call] = deque()
        self._output = Output()
        self._ear, self._voice = socket.socketpair()
        self._ear.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        self._selector.register(self._output.read_end, selectors.EVENT_READ)
        self._next_number = self._num_failed_starts = 0
        self._num_lost: int | None = 0
        """Before the first reward came out. None: one did."""
        self._end: Exception | None = None
        """Why nothing is computed any more."""
        self._lock = threading.Lock()
        """Of `_submitted` with `_end`."""
        self._first: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="rewards", daemon=True)
        self._thread.start()
        self._first.result()

    def submit(self, responses: Sequence[Response]) -> list[Future[Verdict]]:
        """Returns at once. A future raises LostWorkers when the first rewards all took their workers with them, and
        RuntimeError when the pool is closed."""
        now, size = time.monotonic(), self._options.batch_size or 1
        futures: list[Future[Verdict]] = [Future() for _ in responses]
        for future in futures:
            future.set_running_or_notify_cancel()  # It can't be cancelled from now on.
        places = [slice(i, i + size) for i in range(0, len(responses), size)]
        with self._lock:
            end = self._end
            if end is None:
                self._submitted.extend(_Call(responses[place], futures[place], now) for place in places)
        if end is not None:
            _raise_in(futures, end)
        self._wake()
        return futures

    def close(self) -> None:
        """All processes end. What has no reward yet gets a RuntimeError."""
        self._stop(RuntimeError("the rewards were closed"))
        self._wake()
        self._thread.join()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._start_worker()
            while self._end is None:
                self._take_submitted()
                self._assign()
                self._start_missing()
                for key, _ in self._selector.select(self._patience()):
                    self._hear(key)
                self._look_after_workers()
        except BaseException as error:  # Whoever waits for a future must not wait for ever.
            self._stop(RuntimeError(f"the process that computes rewards failed: {type(error).__name__}: {error}"))
        finally:
            self._clean_up()

    def _stop(self, reason: Exception) -> None:
        with self._lock:
            self._end = self._end or reason

    def _wake(self) -> None:
        with suppress(OSError):
            self._voice.send(b"x", socket.MSG_DONTWAIT)

    def _take_submitted(self) -> None:
        with self._lock:
            self._waiting.extend(self._submitted)
            self._submitted.clear()

    def _patience(self) -> float | None:
        """Seconds until something is due without news."""
        now = time.monotonic()
        due = [overdue for worker in self._workers for _, overdue in worker.calls.values()]
        due += [worker.started + _STARTUP_S for worker in self._workers if not worker.is_ready]
        if self._waiting:
            further = self._waiting[0].since + _WAIT_S
            due.append(further if further > now else now + _LOOK_S)  # Whom it was due for, it was done for.
        return min(max(0.0, min(due) - now), _LOOK_S) if due else None

    def _hear(self, key: selectors.SelectorKey) -> None:
        worker = key.data
        if key.fileobj is self._ear:
            with suppress(BlockingIOError):
                self._ear.recv(4096)
        elif worker is None:
            self._output.pass_on()
        elif worker in self._workers:
            worker.channel.flush()
            self._watch(worker)
            if self._listen(worker):
                self._lose(worker)

    def _clean_up(self) -> None:
        assert self._end is not None
        self._take_submitted()
        left = [call for worker in self._workers for call, _ in worker.calls.values()]
        end_all(self._mark, self._workers)
        for call in (*left, *self._waiting):
            _raise_in(call.futures, self._end)
        if not self._first.done():
            self._first.set_exception(self._end)
        self._selector.close()
        for resource in (self._ear, self._voice, self._output):
            resource.close()
        os.close(self._lifeline)

    # --- calls --------------------------------------------------------------------------------------------------------

    @property
    def _slots(self) -> int:
        """Calls at a time that a worker may have."""
        return math.ceil(self._options.concurrency / self._max_workers) if self._is_async else 1

    @property
    def _num_free(self) -> int:
        """Calls that may be begun, had they workers."""
        if not self._is_async:
            return len(self._waiting)
        return self._options.concurrency - sum(len(worker.calls) for worker in self._workers)

    def _assign(self) -> None:
        """Waiting calls to workers, the least busy first, in the order in which they came."""
        while self._waiting and self._num_free > 0:
            call = self._waiting[0]
            free = [worker for worker in self._workers if self._has_room(worker, call)]
            if not free:
                return
            self._waiting.popleft()
            self._send(min(free, key=lambda worker: len(worker.calls)), call)

    def _has_room(self, worker: _Worker, call: _Call) -> bool:
        if not worker.is_ready or any(other.is_alone for other, _ in worker.calls.values()):
            return False
        return len(worker.calls) < (1 if call.is_alone else self._slots)

    def _send(self, worker: _Worker, call: _Call) -> None:
        number, self._next_number = self._next_number, self._next_number + 1
        limit_s = self._options.timeout_s + (_BLOCKED_S if self._is_async else 0)
        worker.calls[number] = call, time.monotonic() + limit_s
        worker.channel.put((number, call.responses))
        self._watch(worker)

    def _answer(self, worker: _Worker, answer: Answer) -> None:
        number, verdicts = answer
        call, _ = worker.calls.pop(number)
        if not isinstance(verdicts, str):
            self._num_lost = None
            for future, verdict in zip(call.futures, verdicts, strict=True):
                future.set_result(verdict)
        else:
            is_timeout = verdicts == TIMED_OUT
            self._fail(call, self._late if is_timeout else verdicts, is_timeout)

    def _fail(self, call: _Call, failure: str, is_timeout: bool = False) -> None:
        """Its one response; several are called one by one."""
        if len(call.futures) == 1:
            call.futures[0].set_result(Verdict(failure=failure, is_timeout=is_timeout))
        else:
            parts = zip(call.responses, call.futures, strict=True)
            self._again(_Call([response], [future], call.since) for response, future in parts)

    def _again(self, calls: Iterable[_Call]) -> None:
        self._waiting.extendleft(reversed(list(calls)))

    @property
    def _late(self) -> str:
        return f"{self._options.path} took longer than timeout_s={self._options.timeout_s:g}"

    # --- workers ------------------------------------------------------------------------------------------------------

    def _start_missing(self) -> None:
        """For calls that have waited for a while, or that have no worker at all."""
        if not self._waiting:
            return
        is_soon = time.monotonic() < self._waiting[0].since + _WAIT_S
        is_starting = not all(worker.is_ready for worker in self._workers)
        has_failed = self._num_failed_starts >= _MAX_STARTS
        if self._workers and (is_soon or is_starting or has_failed):
            return
        num_wanted = math.ceil(min(len(self._waiting), self._num_free) / self._slots)
        for _ in range(min(num_wanted, self._max_workers - len(self._workers))):
            self._start_worker()

    def _start_worker(self) -> None:
        options = self._options
        settings = {
            "path": options.path,
            "takes_batches": options.batch_size is not None,
            "timeout_s": options.timeout_s,
        }
        try:
            worker = _Worker(self._mark, settings, self._output)
        except OSError:
            if not self._workers:
                raise
            self._max_workers = len(self._workers)  # There is no more room for processes, or files.
            return
        self._workers.append(worker)
        self._selector.register(worker.channel, selectors.EVENT_READ, worker)

    def _watch(self, worker: _Worker) -> None:
        more = selectors.EVENT_WRITE if worker.channel.has_more_to_send else 0
        self._selector.modify(worker.channel, selectors.EVENT_READ | more, worker)

    def _listen(self, worker: _Worker) -> bool:
        """Takes its answers. True when there are no more to come."""
        messages, is_closed = worker.channel.take()
        for message in messages:
            if worker.is_ready:
                self._answer(worker, message)
            elif isinstance(message, str):
                self._fail_start(worker, message)
                return False
            else:
                worker.is_ready, self._is_async, self._num_failed_starts = True, message, 0
                if not self._first.done():
                    self._first.set_result(None)
        return is_closed

    def _look_after_workers(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if not worker.is_ready and now > worker.started + _STARTUP_S:
                late = f"reward path={self._options.path!r} could not be imported within {_STARTUP_S:g} s"
                self._fail_start(worker, late)
            elif self._is_late(worker, now):
                self._listen(worker)  # What was answered meanwhile is not late.
                if self._is_late(worker, now):
                    self._blame(worker, lambda code: self._late, is_timeout=True)
            elif worker.has_ended:
                self._listen(worker)
                if worker in self._workers:
                    self._lose(worker)

    def _is_late(self, worker: _Worker, now: float) -> bool:
        return any(now > overdue for _, overdue in worker.calls.values())

    def _lose(self, worker: _Worker) -> None:
        """It ended by itself: killed, out of memory, crashed, os._exit."""
        if worker.is_ready:
            self._blame(worker, lambda code: f"the worker of {self._options.path} died with exit code {code}")
        else:
            self._fail_start(worker, f"reward path={self._options.path!r}: importing it ended the process")

    def _blame(self, worker: _Worker, describe: Callable[[int | None], str], is_timeout: bool = False) -> None:
        """Ends it, and fails the call that it was at. Others that it had, or had not begun, are not at fault."""
        number = worker.place.number
        code = self._remove(worker, grace_s=0.0 if is_timeout else _GRACE_S)
        calls = {n: call for n, (call, _) in worker.calls.items()}
        if number not in calls and len(calls) == 1:
            [(only, call)] = calls.items()
            number = only if is_timeout or call.is_alone else number
        if number in calls:
            self._again(call for n, call in calls.items() if n != number)
            self._fail_with_worker(calls[number], describe(code), is_timeout)
        else:
            self._again(replace(call, num_lost=call.num_lost + 1) for call in calls.values())

    def _fail_with_worker(self, call: _Call, failure: str, is_timeout: bool) -> None:
        if self._num_lost is not None and len(call.futures) == 1:
            self._num_lost += 1
            if self._num_lost >= _MAX_LOST and self._options.may_give_up:
                self._stop(LostWorkers(self._num_lost, call.responses[0], failure))
                self._again([call])  # Its future gets the reason with all others.
                return
        self._fail(call, failure, is_timeout)

    def _fail_start(self, worker: _Worker, problem: str) -> None:
        """Of the first: the function is at fault. Later: so many in a row fail what waits."""
        self._remove(worker)
        self._num_failed_starts += 1
        if not self._first.done():
            self._stop(ValueError(problem))
        elif self._num_failed_starts >= _MAX_STARTS and not self._workers:
            self._num_failed_starts = 0
            while self._waiting:
                for future in self._waiting.popleft().futures:
                    future.set_result(Verdict(failure=problem))

    def _remove(self, worker: _Worker, grace_s: float = 0.0) -> int | None:
        """Ends it, and what it started. Returns its exit code."""
        self._workers.remove(worker)
        self._selector.unregister(worker.channel)
        code = worker.end(grace_s)
        self._output.pass_on()
        return code


def _raise_in(futures: Iterable[Future[Verdict]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
