"""When rewards that fail are more than an accident: said at once, and the end of a run that has no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_MAX_BARREN = 3
"""Rollouts in a row without one reward, after which a run ends that had some before."""


class FailureWatch:
    """Sees what every rollout or evaluation of a run had in rewards.

    Example:
        watch = FailureWatch(say)
        watch.observe("step 1", 32, {"num_timeouts": 0, "num_errors": 3, "example": "reward my:f: KeyError: 'x' (...)"})
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._has_scored = self._has_warned = False
        self._num_barren = 0

    def observe(self, where: str, num_scored: int, failures: Mapping[str, Any]) -> None:
        """Says the first failure that there is, with its example.

        Raises: ValueError with the same when all failed: at once if no reward has come out yet, else the third time in
            a row.
        """
        failed = failures["num_timeouts"] + failures["num_errors"]
        self._has_scored |= num_scored > failed
        self._num_barren = 0 if num_scored > failed else self._num_barren + (num_scored > 0)
        if not failed:
            return
        what = f"{failed} of {num_scored} rewards failed in {where}"
        what += f" ({failures['num_timeouts']} of them timed out)" if failures["num_timeouts"] else ""
        example = failures.get("example") or "logs/rewards.log has the first"
        if failed == num_scored and (not self._has_scored or self._num_barren >= _MAX_BARREN):
            raise ValueError(f"{what}, so there is nothing to learn from; {example}")
        if not self._has_warned:
            self._has_warned = True
            self._say(f"warning: {what} and count as 0; the first: {example}")
