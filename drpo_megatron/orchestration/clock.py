"""Where the time of a run goes: seconds by activity, of the present step and in total. Activities may overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OVERLAP = "overlap"
"""The seconds in which both of `_OVERLAPPING` went on."""
_OVERLAPPING = {"generate", "train"}


class Clock:
    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        """Seconds by activity over the whole run."""
        self._step: dict[str, float] = {}
        self._active: set[str] = set()
        self._last = self._step_started = time.perf_counter()
        self._run_started = self._last

    def go_on_from(self, totals: dict[str, float], wall_s: float) -> None:
        """Of a resumed run: what it had saved comes before what was counted since."""
        self.totals = {name: totals.get(name, 0.0) + self.totals.get(name, 0.0) for name in totals | self.totals}
        self._run_started -= wall_s

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._run_started

    def begin(self, name: str) -> None:
        """No effect on one that goes on already."""
        self._count()
        self._active.add(name)

    def end(self, name: str) -> None:
        self._count()
        self._active.discard(name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is the activity. It may come again within a step, but not within itself."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def lap(self) -> dict[str, float]:
        """Seconds by activity since the last lap, `step` for all of it."""
        self._count()
        seconds = self._step | {"step": self._last - self._step_started}
        self._step, self._step_started = {}, self._last
        return seconds

    def _count(self) -> None:
        """Give the time since the last change to everything that went on in it."""
        now = time.perf_counter()
        names = self._active | ({OVERLAP} if self._active >= _OVERLAPPING else set())
        for name in names:
            self.totals[name] = self.totals.get(name, 0.0) + now - self._last
            self._step[name] = self._step.get(name, 0.0) + now - self._last
        self._last = now
