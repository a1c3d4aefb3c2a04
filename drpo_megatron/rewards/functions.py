"""A reward function of a user, or of ours: how it is called, and what may come back.

function(response, answer, prompt, *, num_tokens, finish_reason, metadata)      what the signature names of the keywords
    -> number | {"reward": number, NAME: number, ...}
function([response, ...], [answer, ...], [prompt, ...], *, num_tokens=[...])    with `reward.batch_size`
    -> [number | {...}, ...]

Either may be `async def`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

from drpo_megatron import imported
from drpo_megatron.rewards.base import Response, Verdict, cut

_REWARD = "reward"
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,79}")
_TAKEN = ("mean", "low", "high", "failures", "failures/sum")
"""Metrics of the run's own: reward/mean, reward/failures/sum, eval/reward/low."""
_MAX_METRICS = 64
_MAX_PROBLEM = 1000


class RewardFunction:
    """The function at `package.module:function`.

    Raises: ValueError, in one line, for a path that can't be imported and a function that can't be called.
    """

    def __init__(self, path: str, takes_batches: bool = False) -> None:
        self._function = imported.load_function(_REWARD, path, imported.REWARD_ARGUMENTS)
        self._keywords = imported.asked_keywords(self._function, imported.REWARD_ARGUMENTS)
        self._takes_batches = takes_batches
        self.is_async = imported.is_async(self._function)

    def __call__(self, responses: Sequence[Response]) -> list[Verdict]:
        """Of a plain function. Raises whatever it raises, and TypeError for what is no reward."""
        return self._verdicts(self._call(responses), len(responses))

    async def answer(self, responses: Sequence[Response]) -> list[Verdict]:
        """Of an async function, likewise."""
        return self._verdicts(await self._call(responses), len(responses))

    def _call(self, responses: Sequence[Response]) -> Any:
        columns: list[list[Any]] = [
            [response.text for response in responses],
            [response.prompt.answer for response in responses],
            [response.prompt for response in responses],
        ]
        named = {keyword: [_keyword(keyword, response) for response in responses] for keyword in self._keywords}
        if self._takes_batches:
            return self._function(*columns, **named)
        return self._function(*(column[0] for column in columns), **{name: all[0] for name, all in named.items()})

    def _verdicts(self, returned: Any, count: int) -> list[Verdict]:
        if not self._takes_batches:
            return [as_verdict(returned)]
        if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__len__"):
            raise TypeError(f"it returned {type(returned).__name__} {cut(returned)}; with batch_size a list of rewards")
        if len(returned) != count:
            raise TypeError(f"it returned {len(returned)} rewards for {count} responses")
        return [as_verdict(value) for value in returned]


def _keyword(name: str, response: Response) -> Any:
    return response.prompt.metadata if name == "metadata" else getattr(response, name)


def as_verdict(value: Any) -> Verdict:
    """What a function returned of one response. TypeError for anything but a number, or a dictionary of numbers."""
    if not isinstance(value, dict):
        return Verdict(_as_number(value, "a reward must be one number, or a dictionary with 'reward'"))
    if _REWARD not in value:
        raise TypeError(f"it returned a dictionary without 'reward': {cut(value)}")
    others = [name for name in value if name != _REWARD]
    if len(others) > _MAX_METRICS:
        raise TypeError(f"it returned {len(others)} metrics; {_MAX_METRICS} are the most")
    for name in others:
        if not isinstance(name, str) or not _METRIC.fullmatch(name) or name in _TAKEN:
            why = "the run's own" if name in _TAKEN else "not of letters, digits and _ . / -"
            raise TypeError(f"the name {cut(name)} of a metric is {why}; give it another")
    metrics = {str(name): _as_number(value[name], f"metric {name!r} must be a number") for name in others}
    return Verdict(_as_number(value[_REWARD], "'reward' must be a number"), metrics)


def _as_number(value: Any, rule: str) -> float:
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("it returned a coroutine; declare it with async def")
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):
        raise TypeError(f"it returned {type(value).__name__} {cut(value)}; {rule}")
    return float(value)


def described(error: BaseException) -> str:
    """Whatever a user's function raised, in at most so many characters."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # Its own __str__ is the user's, too.
        text = type(error).__name__
    return text[:_MAX_PROBLEM]
