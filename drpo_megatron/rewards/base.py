"""What a reward is given, and what comes of it.

Response -> Reward.submit -> a Future of a Verdict each, as they come out
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from drpo_megatron.types import Completion, FinishReason, Prompt


@dataclass(frozen=True, slots=True)
class Response:
    """What a reward may see of one sample."""

    text: str
    prompt: Prompt
    num_tokens: int = 0
    finish_reason: FinishReason = "stop"

    @staticmethod
    def of(prompt: Prompt, completion: Completion) -> Response:
        return Response(completion.text, prompt, len(completion.token_ids), completion.finish_reason)


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one response. Of one that failed the reward is 0."""

    reward: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the function returned beside the reward, by name."""
    failure: str | None = None
    """Why there is no reward, in words."""
    is_timeout: bool = False
    """The failure is a time-out."""


class Reward(Protocol):
    """Worth of responses: larger is better. A text it cannot read is worth 0, not an exception."""

    def submit(self, responses: Sequence[Response]) -> list[Future[Verdict]]:
        """Returns at once. A future raises only when the reward as a whole can't go on."""
        ...

    def close(self) -> None:
        """End the processes it started, if any."""
        ...


class InProcess:
    """A function of (response, answer, prompt) that neither hangs nor crashes, called here."""

    def __init__(self, function: Callable[[str, str, Prompt], float]) -> None:
        self._function = function

    def submit(self, responses: Sequence[Response]) -> list[Future[Verdict]]:
        futures = []
        for response in responses:
            future: Future[Verdict] = Future()
            reward = self._function(response.text, response.prompt.answer, response.prompt)
            future.set_result(Verdict(reward))
            futures.append(future)
        return futures

    def close(self) -> None:
        pass


class LostWorkers(Exception):
    """Every reward so far took its worker with it."""

    def __init__(self, count: int, response: Response, failure: str) -> None:
        super().__init__(count, response, failure)
        self.count, self.response, self.failure = count, response, failure


def cut(value: Any, length: int = 80) -> str:
    """Its repr, or the beginning of it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."
