"""What signals end a run, and which of them came.

    with stop_signals():                     the whole command
        ...                                  one of STOP_SIGNALS, or Ctrl-C, raises KeyboardInterrupt
        with gently(loop.request_stop):      while steps are done: a stop signal calls this instead
            ...
        with held():                         while processes are ended: only noted
            ...
        which()                              the first that came; None: none did

A KeyboardInterrupt that is raised inside a callback of Ray's or in a destructor gets lost, and some libraries raise
another error in its place. So what came is noted here, and every wait asks for it (`raise_if_due`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP)
"""What a scheduler sends before a time limit or a preemption, and a terminal that is closed."""


class _State:
    came: signal.Signals | None = None
    answer: Callable[[str], None] | None = None
    """Instead of raising."""


_state = _State()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Of the main thread. What was ignored when the process started (nohup) stays ignored."""
    _state.came = None
    wanted = (*STOP_SIGNALS, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def which() -> signal.Signals | None:
    return _state.came


def raise_if_due() -> None:
    """What a signal raised before, if it got lost."""
    if _state.came is not None and (_state.answer is None or _state.came == signal.SIGINT):
        raise KeyboardInterrupt(_state.came)


@contextmanager
def gently(answer: Callable[[str], None]) -> Iterator[None]:
    """Stop signals call `answer` with a reason, however often they come; also for one that came before."""
    _state.answer = answer
    try:
        if _state.came is not None:
            answer(_reason(_state.came))
        yield
    finally:
        _state.answer = None


@contextmanager
def held() -> Iterator[None]:
    """All of them are only noted: what is in the block goes on to its end."""
    wanted = (*STOP_SIGNALS, signal.SIGINT)
    before = {
        number: signal.signal(number, _note) for number in wanted if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _receive(number: int, frame: Any) -> None:
    _note(number, frame)
    if _state.answer is None or number == signal.SIGINT:
        raise KeyboardInterrupt(number)
    _state.answer(_reason(signal.Signals(number)))


def _note(number: int, frame: Any) -> None:
    """Ctrl-C counts more than what a scheduler said before: a user wants the end now."""
    if _state.came is None or number == signal.SIGINT:
        _state.came = signal.Signals(number)


def _reason(number: signal.Signals) -> str:
    return f"{number.name} received"
