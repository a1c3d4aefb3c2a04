"""What a reward is."""

from __future__ import annotations

from typing import Protocol

from drpo_megatron.types import Prompt


class Reward(Protocol):
    """Worth of one response: larger is better. A text it cannot read is worth 0, not an exception."""

    def __call__(self, response: str, answer: str, prompt: Prompt) -> float:
        """Raises RewardTimeout if it took longer than the reward's own limit."""
        ...

    def close(self) -> None:
        """End the processes it started, if any."""
        ...


class WorkerDied(RuntimeError):
    """The process that computed the reward of one response ended."""


class RewardTimeout(Exception):
    """The reward of one response took too long."""
