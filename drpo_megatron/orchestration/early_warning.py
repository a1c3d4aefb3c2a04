"""The early warning: how far engine and trainer are apart, against the run's own history.

    growth = mean of |pi_old - mu| over the last `window` steps / median over all steps before them

Growth of this mismatch comes before most collapses, while rewards and the share of clipped tokens still look well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from drpo_megatron.config.precision import EarlyWarningSection

METRIC = "mismatch/abs_prob_shift/mean"
HARMLESS = 1e-3
"""A mean |pi_old - mu| below this is what healthy BF16 engines have, and never warned of however it grows."""


class EarlyWarning:
    def __init__(self, section: EarlyWarningSection) -> None:
        self.section = section
        self.history: list[float] = []
        self.is_above = False
        self.has_fallen_back = False
        """Whether the rollouts are unquantised by now (action bf16-rollout)."""

    def observe(self, mismatch: float) -> str | None:
        """Take in one step; the warning when the mismatch begins to be too large, and None as long as it stays so."""
        if math.isfinite(mismatch):
            self.history.append(mismatch)
        was_above, growth = self.is_above, self.growth()
        self.is_above = growth > self.section.factor and self._recent() > HARMLESS
        if not self.is_above or was_above:
            return None
        self.has_fallen_back |= self.section.action == "bf16-rollout"
        return (
            f"mismatch between engine and trainer: mean |pi_old - mu| of the last {self.section.window} steps is "
            f"{self._recent():.2g}, {growth:.1f} times the median of the steps before them"
        )

    def growth(self) -> float:
        """0 while there is too little history to judge."""
        window = self.section.window
        if len(self.history) < self.section.min_history + window:
            return 0.0
        return self._recent() / max(median(self.history[:-window]), 1e-30)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "is_above": self.is_above, "has_fallen_back": self.has_fallen_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = list(state["history"])
        self.is_above, self.has_fallen_back = state["is_above"], state["has_fallen_back"]

    def _recent(self) -> float:
        return fmean(self.history[-self.section.window :])
