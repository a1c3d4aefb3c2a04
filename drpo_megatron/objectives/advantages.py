"""Group-relative advantages: how much better a completion did than its siblings of the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from drpo_megatron.rounding import tolerance

AdvantageName = Literal["group_mean", "group_mean_std", "rloo"]

_STD_EPS = 1e-6
"""Added to the standard deviation, as in the released GRPO implementations."""


def is_equal_group(rewards: Sequence[float]) -> bool:
    """Whether all rewards are equal up to rounding: such a group has no gradient. True for a group of none or one."""
    return len(set(rewards)) <= 1 or max(rewards) - min(rewards) <= tolerance(rewards)


def group_advantages(rewards: Sequence[float], name: AdvantageName = "group_mean") -> list[float]:
    """The advantage of each of the G completions of one prompt.

        group_mean      R_i - mean(R)                            Dr. GRPO, arXiv:2503.20783, and the DRPO runs
        group_mean_std  (R_i - mean(R)) / (std(R) + 1e-6)        GRPO, arXiv:2402.03300; std with G - 1
        rloo            R_i - mean of the other G - 1 rewards    RLOO, arXiv:2402.14740

    Exactly 0 in a group of rewards that are equal up to rounding (`is_equal_group`). Raises ValueError for a reward
    that is not finite and for an unknown name.
    """
    for index, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise ValueError(f"reward {index} of the group is {reward}; rewards must be finite numbers")
    if name not in ("group_mean", "group_mean_std", "rloo"):
        raise ValueError(f"advantages name={name!r} is unknown; use group_mean, group_mean_std or rloo")
    size = len(rewards)
    if is_equal_group(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    centred = [reward - mean for reward in rewards]
    if name == "group_mean":
        return centred
    if name == "rloo":
        return [c * size / (size - 1) for c in centred]
    std = math.sqrt(math.fsum(c * c for c in centred) / (size - 1))
    return [c / (std + _STD_EPS) for c in centred]
