"""When rewards that fail are more than an accident: said at once, and the end of a run that has no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from drpo_megatron.rewards.scorer import Scored
from drpo_megatron.rounding import tolerance

_MAX_BARREN = 3
"""Rollouts in a row without one reward, after which a run ends that had some before."""
_MIN_GROUPS = 2
"""Prompts whose rewards say something of the reward, and not of the prompt alone."""


class FailureWatch:
    """Sees what every rollout or evaluation of a run had in rewards.

    Example:
        watch = FailureWatch(say)
        watch.observe("step 1", scored)
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._has_scored = self._has_warned = self._has_seen_rewards = False
        self._num_barren = 0

    def observe_rewards(self, where: str, groups: Sequence[Sequence[float]]) -> None:
        """Says of the first rollout that all its rewards are the same, as those are of a reward or of answers that can't
        work. One prompt alone may well be too easy or too hard; of none that is said.

        Args:
            groups: the rewards of every prompt's responses.
        """
        if self._has_seen_rewards or not groups:
            return
        self._has_seen_rewards = True
        rewards = [reward for group in groups for reward in group]
        if self._has_warned or len(groups) < _MIN_GROUPS or not rewards:  # Failures count as 0, and are said already.
            return
        if max(rewards) - min(rewards) > tolerance(rewards):
            return
        self._say(
            f"warning: all {len(rewards)} rewards in {where} are {rewards[0]:g}, of {len(groups)} different prompts, so it "
            "teaches nothing; if they stay so, the reward or the answers don't fit what the model writes: rollout.dump=true "
            "shows both"
        )

    def observe(self, where: str, *scored: Scored) -> None:
        """Says the first failure that there is, with its example.

        Raises: ValueError with the same when all failed: at once if no reward has come out yet, else the third time in
            a row.
        """
        num_scored = sum(len(some.rewards) for some in scored)
        num_failed = sum(some.num_failures for some in scored)
        num_timeouts = sum(some.num_timeouts for some in scored)
        self._has_scored |= num_scored > num_failed
        self._num_barren = 0 if num_scored > num_failed else self._num_barren + (num_scored > 0)
        if not num_failed:
            return
        what = f"{num_failed} of {num_scored} rewards failed in {where}"
        what += f" ({num_timeouts} of them timed out)" if num_timeouts else ""
        example = next((some.example for some in scored if some.example), "logs/rewards.log has the first")
        if num_failed == num_scored and (not self._has_scored or self._num_barren >= _MAX_BARREN):
            raise ValueError(f"{what}, so there is nothing to learn from; {example}")
        if not self._has_warned:
            self._has_warned = True
            self._say(f"warning: {what} and count as 0; the first: {example}")
