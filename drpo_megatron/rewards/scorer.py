"""Rewards of a whole rollout, where one bad response cannot end the run, and where nothing goes wrong unseen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from drpo_megatron.config.sections import RewardConfig
from drpo_megatron.rewards.base import RewardTimeout, WorkerDied
from drpo_megatron.rewards.imported import as_number
from drpo_megatron.rewards.registry import build
from drpo_megatron.types import Completion, Prompt

_MAX_LOST = 8

logger = logging.getLogger(__name__)


class RewardScorer:
    """Scores completions with the reward of a config section.

    Example:
        rewards, counts = RewardScorer(config.reward).score([(prompt, completion), ...])
    """

    def __init__(self, config: RewardConfig) -> None:
        self._reward = build(config)
        self._name = config.path if config.name == "import" else config.name
        self._num_lost: int | None = 0
        """Workers that were lost before the first reward came out. None: one did."""
        self.failure: str | None = None
        """The first reward that failed, in words: the function, the error, and the response."""

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> tuple[list[float], dict[str, int]]:
        """The rewards in order, and {"num_timeouts", "num_errors"} of this call.

        A response whose reward times out, raises or is no number is worth 0; the first is logged, and kept as `failure`.
        Raises ValueError, naming function and prompt, for a reward that is not finite: training on it would end in NaN.
        """
        counts = {"num_timeouts": 0, "num_errors": 0}
        return [self._score_one(prompt, completion, counts) for prompt, completion in pairs], counts

    def close(self) -> None:
        self._reward.close()

    def _score_one(self, prompt: Prompt, completion: Completion, counts: dict[str, int]) -> float:
        try:
            reward = as_number(self._reward(completion.text, prompt.answer, prompt))
        except RewardTimeout as error:
            counts["num_timeouts"] += 1
            self._note(f"{error}", prompt, completion)
            self._lose()
            return 0.0
        except WorkerDied as error:
            counts["num_errors"] += 1
            self._note(f"{error}", prompt, completion)
            self._lose()
            return 0.0
        except Exception as error:  # User code and symbolic algebra raise anything; the counts and the driver say so.
            counts["num_errors"] += 1
            self._note(f"{error}", prompt, completion)
            return 0.0
        self._num_lost = None
        if not math.isfinite(reward):
            raise ValueError(
                f"reward {self._name}: the reward of a response to prompt {prompt.prompt_id} is {reward}; rewards must be "
                f"finite numbers (answer {_short(prompt.answer)}, response {_short(completion.text)})"
            )
        return reward

    def _lose(self) -> None:
        """A worker; each costs its time limit, or a start. Raises ValueError when there was nothing else so far."""
        if self._num_lost is None:
            return
        self._num_lost += 1
        if self._num_lost >= _MAX_LOST:
            raise ValueError(f"the first {self._num_lost} rewards each took their worker with them; {self.failure}")

    def _note(self, error: str, prompt: Prompt, completion: Completion) -> None:
        if self.failure is not None:
            return
        self.failure = (
            f"reward {self._name}: {error} (prompt {prompt.prompt_id}, answer {_short(prompt.answer)}, response "
            f"{_short(completion.text)})"
        )
        logger.warning("the first reward that failed is 0 (later ones are only counted): %s", self.failure)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
