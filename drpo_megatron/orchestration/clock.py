"""Where the time of a run goes: seconds by phase, of the present step and in total."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    def __init__(self, totals: dict[str, float] | None = None, wall_s: float = 0.0) -> None:
        """A resumed run goes on from the totals it saved."""
        self.totals: dict[str, float] = dict(totals or {})
        """Seconds by phase over the whole run."""
        self._step: dict[str, float] = {}
        self._step_started = time.perf_counter()
        self._run_started = time.perf_counter() - wall_s

    @property
    def wall_s(self) -> float:
        return time.perf_counter() - self._run_started

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to the phase. Phases may recur within a step, but not nest."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.totals[name] = self.totals.get(name, 0.0) + seconds
        self._step[name] = self._step.get(name, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last lap, `step` for all of it."""
        now = time.perf_counter()
        seconds = self._step | {"step": now - self._step_started}
        self._step, self._step_started = {}, now
        return seconds
