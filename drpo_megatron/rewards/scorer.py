"""Rewards of a whole rollout, where one bad response cannot end the run, and where nothing goes wrong unseen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from drpo_megatron.config.sections import RewardConfig
from drpo_megatron.rewards.base import RewardTimeout
from drpo_megatron.rewards.registry import build
from drpo_megatron.types import Completion, Prompt

logger = logging.getLogger(__name__)


class RewardScorer:
    """Scores completions with the reward of a config section.

    Example:
        rewards, counts = RewardScorer(config.reward).score([(prompt, completion), ...])
    """

    def __init__(self, config: RewardConfig) -> None:
        self._reward = build(config)
        self._has_logged = False

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> tuple[list[float], dict[str, int]]:
        """The rewards in order, and {"num_timeouts", "num_errors"} of this call.

        A response whose reward times out or raises is worth 0; the first exception is logged with the prompt's id.
        Raises ValueError, naming the prompt, for a reward that is not finite: training on it would end in NaN.
        """
        counts = {"num_timeouts": 0, "num_errors": 0}
        return [self._score_one(prompt, completion, counts) for prompt, completion in pairs], counts

    def close(self) -> None:
        self._reward.close()

    def _score_one(self, prompt: Prompt, completion: Completion, counts: dict[str, int]) -> float:
        try:
            reward = float(self._reward(completion.text, prompt.answer, prompt))
        except RewardTimeout:
            counts["num_timeouts"] += 1
            return 0.0
        except Exception as error:  # User code and symbolic algebra raise anything; the count and the log say so.
            counts["num_errors"] += 1
            if not self._has_logged:
                self._has_logged = True
                logger.warning(
                    "the reward of a response to prompt %s failed and is 0 (later failures are only counted): %s",
                    prompt.prompt_id,
                    error,
                )
            return 0.0
        if not math.isfinite(reward):
            raise ValueError(
                f"the reward of a response to prompt {prompt.prompt_id} is {reward}; rewards must be finite numbers "
                f"(response: {completion.text[:80]!r})"
            )
        return reward
