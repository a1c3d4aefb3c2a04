"""Rewards of a whole rollout, where one bad response cannot end the run, and where nothing goes wrong unseen."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from drpo_megatron.config.sections import RewardConfig
from drpo_megatron.rewards.base import LostWorkers, Response, Verdict, cut
from drpo_megatron.rewards.registry import build
from drpo_megatron.types import Completion, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scored:
    """Of some responses, in their order."""

    rewards: list[float]
    metrics: list[Mapping[str, float]]
    """What the function returned beside each reward."""
    num_timeouts: int
    num_errors: int
    """Rewards that failed, and count as 0."""
    example: str | None = None
    """The first reward that ever failed, in words: the function, the error, and the response."""

    @property
    def num_failures(self) -> int:
        return self.num_timeouts + self.num_errors


def metric_means(group: str, metrics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """`group/NAME` for every metric: the mean over the responses that have it."""
    values: dict[str, list[float]] = {}
    for one in metrics:
        for name, value in one.items():
            values.setdefault(f"{group}/{name}", []).append(value)
    return {name: math.fsum(some) / len(some) for name, some in sorted(values.items())}


class RewardScorer:
    """Scores completions with the reward of a config section.

    Example:
        scored = RewardScorer(config.reward).score([(prompt, completion), ...])
    """

    def __init__(self, config: RewardConfig) -> None:
        self._reward = build(config)
        self._name = config.path if config.name == "import" else config.name
        self._example: str | None = None

    def score(self, pairs: Sequence[tuple[Prompt, Completion]]) -> Scored:
        """What the rewards are doesn't depend on the number of workers, nor on which of them ends first.

        A response whose reward times out, raises or is no number is worth 0; the first is logged, and kept as `example`.
        Raises ValueError, naming function and prompt, for a reward or a metric that is not finite, since training on it
        would end in NaN, and for a function that takes every worker with it.
        """
        responses = [Response.of(prompt, completion) for prompt, completion in pairs]
        futures = self._reward.submit(responses)
        try:
            return self._scored(responses, [future.result() for future in futures])
        except LostWorkers as lost:
            raise self._given_up(lost) from None

    async def score_responses(self, responses: Sequence[Response]) -> Scored:
        """`score`, beside others that are being scored."""
        futures = [asyncio.wrap_future(future) for future in self._reward.submit(responses)]
        try:
            return self._scored(responses, await asyncio.gather(*futures))
        except LostWorkers as lost:
            raise self._given_up(lost) from None

    def close(self) -> None:
        self._reward.close()

    def _scored(self, responses: Sequence[Response], verdicts: Sequence[Verdict]) -> Scored:
        for response, verdict in zip(responses, verdicts, strict=True):
            self._check(response, verdict)
        num_timeouts = sum(verdict.is_timeout for verdict in verdicts)
        num_failures = sum(verdict.failure is not None for verdict in verdicts)
        return Scored(
            [verdict.reward for verdict in verdicts],
            [verdict.metrics for verdict in verdicts],
            num_timeouts,
            num_failures - num_timeouts,
            self._example,
        )

    def _check(self, response: Response, verdict: Verdict) -> None:
        if verdict.failure is not None and self._example is None:
            self._example = self._described(response, verdict.failure)
            logger.warning("the first reward that failed is 0 (later ones are only counted): %s", self._example)
        for name, value in (
            ("the reward", verdict.reward),
            *((f"metric {n!r}", v) for n, v in verdict.metrics.items()),
        ):
            if not math.isfinite(value):
                raise ValueError(
                    f"reward {self._name}: {name} of a response to prompt {response.prompt.prompt_id} is {value}; rewards "
                    f"and metrics must be finite numbers (answer {cut(response.prompt.answer)}, response {cut(response.text)})"
                )

    def _described(self, response: Response, failure: str) -> str:
        return (
            f"reward {self._name}: {failure} (prompt {response.prompt.prompt_id}, answer {cut(response.prompt.answer)}, "
            f"response {cut(response.text)})"
        )

    def _given_up(self, lost: LostWorkers) -> ValueError:
        what = self._described(lost.response, lost.failure)
        return ValueError(f"the first {lost.count} rewards each took their worker with them; {what}")
