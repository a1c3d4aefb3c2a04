"""A user's own reward by import path."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from drpo_megatron import imported
from drpo_megatron.types import Prompt

RewardFunction = Callable[[str, str, Prompt], float]
"""(response, answer, prompt) -> reward."""


def load_function(path: str) -> RewardFunction:
    """The function at `package.module:function`. ValueError says in a line what is wrong with it."""
    return imported.load_function("reward", path, imported.REWARD_ARGUMENTS)


def as_number(value: Any) -> float:
    """What a reward function returned. TypeError for anything but a number: text, None, a dictionary, a coroutine."""
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("it returned a coroutine; make it a plain function, not async")
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
        raise TypeError(f"it returned {type(value).__name__} {_short(value)}; a reward must be one number")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
