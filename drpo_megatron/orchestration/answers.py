"""Answers of data files that the reward can't read: no response to such a problem could ever be right."""

from __future__ import annotations

from collections.abc import Sequence

from drpo_megatron.config.sections import ArithmeticReward, MathReward, RewardConfig
from drpo_megatron.data.jsonl import read_jsonl
from drpo_megatron.rewards.arithmetic import is_integer
from drpo_megatron.rewards.base import Response
from drpo_megatron.rewards.pool import PoolOptions, WorkerPool
from drpo_megatron.types import Prompt

_READABLE = "drpo_megatron.rewards.math:readable"
_NUM_NAMED = 10


def unreadable_answers(path: str, prompts: Sequence[Prompt], reward: RewardConfig) -> list[str]:
    """Lines of text: how many answers of the file the reward can't read, then the first of them with file and line.

    `prompts` are what was read of the file, in its order. Empty when all can be read, and for a user's reward, whose
    business they are. Raises ValueError when none can be read.
    """
    can_read = _readable({prompt.answer for prompt in prompts}, reward)
    places = [place for place, _ in read_jsonl(path)]
    found = [
        f"{place}: {prompt.answer[:100]!r} (prompt {prompt.prompt_id})"
        for place, prompt in zip(places, prompts, strict=True)
        if not can_read[prompt.answer]
    ]
    if not found:
        return []
    head = f"{len(found)} of {len(prompts)} answers of {path} can't be read by reward={reward.name}: never right"
    more = [f"and {len(found) - _NUM_NAMED} more"] if len(found) > _NUM_NAMED else []
    lines = [head, *(f"  {line}" for line in [*found[:_NUM_NAMED], *more])]
    if len(found) == len(prompts):
        raise ValueError("\n".join([*lines, "write the answers alone, or choose another reward"]))
    return lines


def _readable(answers: set[str], reward: RewardConfig) -> dict[str, bool]:
    match reward:
        case ArithmeticReward():
            return {answer: is_integer(answer) for answer in answers}
        case MathReward():
            return _math_readable(sorted(answers), reward)
    return dict.fromkeys(answers, True)


def _math_readable(answers: Sequence[str], reward: MathReward) -> dict[str, bool]:
    """Plain integers need no parser. The rest goes to processes that can be killed, as when answers are compared."""
    can_read = dict.fromkeys(answers, True)
    others = [answer for answer in answers if not is_integer(answer)]
    if others:
        pool = WorkerPool(PoolOptions(_READABLE, reward.timeout_s, reward.num_workers, may_give_up=False))
        try:
            verdicts = pool.submit([Response("", Prompt("", (), answer)) for answer in others])
            can_read |= {
                answer: verdict.result().reward == 1.0 for answer, verdict in zip(others, verdicts, strict=True)
            }
        finally:
            pool.close()
    return can_read
