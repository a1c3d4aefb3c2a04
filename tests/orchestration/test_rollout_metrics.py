"""What `Rollouts.take` draws, and that its metrics count every group that was drawn exactly once.

Engine and rewards answer at once here, so that what they were asked is known; the rest is the real thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from drpo_megatron.config import Config
from drpo_megatron.data.prompts import PromptStream
from drpo_megatron.orchestration.clock import Clock
from drpo_megatron.orchestration.rollouts import Rollouts
from drpo_megatron.rewards.failures import FailureWatch
from drpo_megatron.rewards.scorer import Scored
from drpo_megatron.types import Completion, Prompt
from tests.tiny import tiny_config

COUNT, SIZE, NUM_TOKENS = 8, 4, 2


class Engines:
    """Draws NUM_TOKENS tokens a completion with the present `version`."""

    def __init__(self) -> None:
        self.supervisor = self
        self.version = 0
        self.rounds: list[int] = []

    def wait_until(self, is_enough: Callable[[], bool]) -> None:
        assert is_enough()

    def stream(
        self, requests: Sequence[Any], params: Any, receive: Callable[[list[tuple[int, Completion]]], None]
    ) -> None:
        self.rounds.append(len(requests) // SIZE)
        drawn = Completion((1, 2), (-1.0, -1.0), "stop", "x", self.version)
        receive([(index, drawn) for index in range(len(requests))])


class Rewards:
    """`rewards_of(prompt)` a group; all of it is kept."""

    def __init__(self, rewards_of: Callable[[Prompt], Sequence[float]]) -> None:
        self.rewards_of = rewards_of
        self.given: list[float] = []

    def submit(self, pairs: Sequence[tuple[Prompt, Completion]], receive: Callable[[Any], None]) -> None:
        rewards = [r for prompt, _ in pairs[::SIZE] for r in self.rewards_of(prompt)]
        self.given += rewards
        receive(Scored(rewards, [{"seen": r + 1} for r in rewards], num_timeouts=0, num_errors=0))


def rollouts(rewards_of: Callable[[Prompt], Sequence[float]], **rollout: Any) -> tuple[Rollouts, Engines, Rewards]:
    config: Config = tiny_config(
        "unused", run={"num_steps": 9}, rollout={"prompts_per_step": COUNT, "samples_per_prompt": SIZE} | rollout
    )
    engines, rewards = Engines(), Rewards(rewards_of)
    prompts = PromptStream([Prompt(f"p{i}", (i,), "1") for i in range(300)], seed=0, shuffle=False)
    return Rollouts(config, engines, rewards, prompts, Clock()), engines, rewards  # type: ignore[arg-type]


def number(prompt: Prompt) -> int:
    return int(prompt.prompt_id[1:])


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_every_step_has_its_own_further_rounds_even_after_one_that_could_not_be_filled(rounds: int) -> None:
    source, engines, rewards = rollouts(lambda prompt: [1.0] * SIZE, resample_equal_groups=rounds)
    for step in range(1, 4):
        engines.rounds, engines.version = [], step - 1
        groups, metrics = source.take(step, policy_version=step - 1)
        assert engines.rounds == [COUNT] * (1 + rounds)
        assert len(groups) == COUNT and metrics["rollout/num_dropped/sum"] == 0
        assert metrics["rollout/num_tokens"] == COUNT * (1 + rounds) * SIZE * NUM_TOKENS
    assert len(rewards.given) == 3 * COUNT * (1 + rounds) * SIZE


def test_rewards_that_differ_by_rounding_are_drawn_again() -> None:
    source, engines, _ = rollouts(
        lambda p: [0.3, 0.1 + 0.2, 0.3, 0.3] if number(p) < 3 else [1, 0, 1, 0], resample_equal_groups=1
    )
    groups, metrics = source.take(1, policy_version=0)
    assert engines.rounds == [8, 3]
    assert [number(group.prompt) for group in groups] == list(range(3, 11))
    assert metrics["rollout/equal_group_share"] == 3 / 11
    assert metrics["reward/mean"] == pytest.approx((3 * 0.3 + 8 * 0.5) / 11)
    assert metrics["reward/seen"] == pytest.approx(1 + metrics["reward/mean"])  # Of all that was drawn, likewise.


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_metrics_of_all_steps_count_every_group_once(staleness: int) -> None:
    """Two of three groups are equal; with rewards that say which prompt it was, no group is missing and none is twice."""

    def rewards_of(prompt: Prompt) -> list[float]:
        n = float(number(prompt))
        return [n, n, n, n + 4 if number(prompt) % 3 == 0 else n]

    source, engines, rewards = rollouts(rewards_of, resample_equal_groups=1, max_staleness=staleness)
    seen, total, trained = 0.0, 0.0, []
    for step in range(1, 10):
        engines.version = step - 1
        groups, metrics = source.take(step, policy_version=step - 1)
        source.draw_ahead(step)
        trained += [number(group.prompt) for group in groups]
        num_rewards = metrics["rollout/num_tokens"] / NUM_TOKENS
        seen, total = seen + num_rewards, total + metrics["reward/mean"] * num_rewards
        assert 0 <= metrics["rollout/staleness/max"] <= staleness
    left = [reward for group in source.buffer for reward in group.rewards]
    assert seen + len(left) == len(rewards.given)
    assert total + math.fsum(left) == pytest.approx(math.fsum(rewards.given))
    assert len(trained) == len(set(trained)) == 9 * COUNT


class Failing(Rewards):
    """So many of the rewards of each step fail; the first by a time-out."""

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__(lambda prompt: [0.0] * SIZE)
        self.shares, self.num_calls = list(shares), 0

    def submit(self, pairs: Sequence[tuple[Prompt, Completion]], receive: Callable[[Any], None]) -> None:
        num_failed = round(self.shares[self.num_calls // COUNT] * len(pairs))
        self.num_calls += 1
        num_timeouts = int(self.num_calls == 1)
        example = "reward f: KeyError 'x'"
        receive(Scored([0.0] * len(pairs), [{}] * len(pairs), num_timeouts, num_failed - num_timeouts, example))


def taken(shares: Sequence[float], said: list[str]) -> int:
    """Steps that are done before rewards end the run."""
    source, _, _ = rollouts(lambda prompt: [])
    source.rewards, source._watch = Failing(shares), FailureWatch(said.append)  # type: ignore[assignment]
    for step in range(1, len(shares) + 1):
        try:
            source.take(step, policy_version=0)
        except ValueError as error:
            said.append(str(error))
            return step - 1
    return len(shares)


def test_a_run_whose_rewards_all_fail_ends_in_its_first_step() -> None:
    said: list[str] = []
    assert taken([1.0, 1.0], said) == 0
    assert said == [
        "32 of 32 rewards failed in step 1 (1 of them timed out), so there is nothing to learn from; reward f: KeyError 'x'"
    ]


def test_rewards_that_fail_are_said_once_and_end_a_run_when_none_comes_out_three_times_in_a_row() -> None:
    said: list[str] = []
    assert taken([0.5, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5], said) == 6
    assert len(said) == 2 and said[0].startswith("warning: 16 of 32 rewards failed in step 1")
    assert said[1].startswith("32 of 32 rewards failed in step 7")
