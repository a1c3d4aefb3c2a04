"""What the first rollout's rewards say of a reward, or of answers, that can't work."""

from __future__ import annotations

import pytest

from drpo_megatron.rewards.failures import FailureWatch


def said(*rollouts: list[list[float]]) -> list[str]:
    lines: list[str] = []
    watch = FailureWatch(lines.append)
    for step, groups in enumerate(rollouts, start=1):
        watch.observe_rewards(f"step {step}", groups)
    return lines


@pytest.mark.parametrize("value, shown", [(0.0, "0"), (1.0, "1"), (-1.0, "-1"), (0.25, "0.25")])
def test_a_first_rollout_of_one_value_is_said_once(value: float, shown: str) -> None:
    groups = [[value] * 4] * 3
    [line] = said(groups, groups)
    assert line.startswith(f"warning: all 12 rewards in step 1 are {shown}, of 3 different prompts")


def test_what_is_equal_up_to_rounding_is_one_value() -> None:
    assert len(said([[0.1 + 0.2, 0.3], [0.3, 0.3]])) == 1


@pytest.mark.parametrize(
    "groups",
    [
        [[0.0, 0.0], [0.0, 1.0]],
        [[0.0, 0.0], [1.0, 1.0]],  # Nothing to learn from, but the reward tells answers apart.
        [[-1.0, -1.0], [-1.0, -0.5]],
        [[1.0] * 16],  # One prompt may well be too easy.
        [],
    ],
)
def test_nothing_is_said_of_others(groups: list[list[float]]) -> None:
    assert said(groups) == []


def test_later_rollouts_may_be_of_one_value() -> None:
    assert said([[0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]) == []
    assert len(said([], [[0.0], [0.0]])) == 1  # The first that has any.
