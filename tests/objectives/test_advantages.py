"""Advantages and aggregation weights against arithmetic by hand, and their independence of how a batch is split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_megatron.objectives.advantages import AdvantageName, group_advantages, is_equal_group
from drpo_megatron.objectives.aggregation import AggregationMode, token_weights

MODES: list[AggregationMode] = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def test_advantages_as_computed_by_hand() -> None:
    # Mean 0.25, deviations .75 -.25 -.25 -.25, variance (.5625 + 3 * .0625) / 3 = 0.25, std 0.5.
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert group_advantages(rewards, "group_mean") == [0.75, -0.25, -0.25, -0.25]
    assert group_advantages(rewards, "group_mean_std") == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    assert group_advantages(rewards, "rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_rloo_compares_with_the_mean_of_the_others(rewards: list[float]) -> None:
    others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    expected = [reward - mean for reward, mean in zip(rewards, others, strict=True)]
    if is_equal_group(rewards):  # Up to the rounding of FP32: 6e-8 of 10.
        assert max(rewards) - min(rewards) < 1e-5
        expected = [0.0] * len(rewards)
    assert group_advantages(rewards, "rloo") == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "rloo"])
@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.3], []], ids=["0.1 times 7", "one", "none"])
def test_equal_rewards_give_exactly_no_advantage(name: str, rewards: list[float]) -> None:
    assert is_equal_group(rewards)
    assert group_advantages(rewards, name) == [0.0] * len(rewards)  # type: ignore[arg-type]


def test_one_different_reward_makes_a_group_unequal() -> None:
    assert not is_equal_group([0.0, 0.0, 1e-9])


def test_bad_advantage_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="reward 1 of the group is nan"):
        group_advantages([0.0, float("nan")], "group_mean")
    with pytest.raises(ValueError, match="'mean' is unknown; use group_mean"):
        group_advantages([0.0, 1.0], "mean")  # type: ignore[arg-type]


def _loss(per_token: list[list[float]], weights: list[float]) -> float:
    return sum(weight * loss for weight, losses in zip(weights, per_token, strict=True) for loss in losses)


def test_aggregation_as_computed_by_hand() -> None:
    # Token losses [1, 2, 3], [], [10]: token mean 16/4 = 4; mean of the means 2 and 10 = 6; (6 + 10) / 2 / 8 = 1.
    losses = [[1.0, 2.0, 3.0], [], [10.0]]
    counts = [len(x) for x in losses]
    assert _loss(losses, token_weights(counts, "token-mean")) == pytest.approx(4)
    assert _loss(losses, token_weights(counts, "seq-mean-token-mean")) == pytest.approx(6)
    assert _loss(losses, token_weights(counts, "seq-mean-token-sum-norm", horizon=8)) == pytest.approx(1)
    assert token_weights(counts, "seq-mean-token-mean")[1] == 0


@pytest.mark.parametrize("mode", MODES)
@given(counts=st.lists(st.integers(0, 50), max_size=8), seed=st.integers(0, 9))
def test_the_sum_of_any_split_is_the_loss_of_the_whole(mode: AggregationMode, counts: list[int], seed: int) -> None:
    weights = token_weights(counts, mode, horizon=64)
    losses = [torch.randn(n, generator=torch.Generator().manual_seed(seed + i)).tolist() for i, n in enumerate(counts)]
    live = [torch.tensor(x, dtype=torch.float64) for x in losses if x]
    if mode == "token-mean":
        expected = torch.cat(live).mean().item() if live else 0.0
    elif mode == "seq-mean-token-mean":
        expected = torch.stack([x.mean() for x in live]).mean().item() if live else 0.0
    else:
        expected = (torch.stack([x.sum() for x in live]).mean() / 64).item() if live else 0.0
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    ranks = [_loss([losses[i] for i in order[k::3]], [weights[i] for i in order[k::3]]) for k in range(3)]
    assert sum(ranks) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_a_batch_without_tokens_has_zero_weights(mode: AggregationMode, counts: list[int]) -> None:
    assert token_weights(counts, mode, horizon=8) == [0.0] * len(counts)


def test_bad_aggregation_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="needs a horizon of at least 1 token; it is None"):
        token_weights([3], "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="holds -1"):
        token_weights([3, -1], "token-mean")
    with pytest.raises(ValueError, match="'mean' is unknown; use token-mean"):
        token_weights([3], "mean")  # type: ignore[arg-type]


EQUAL_BUT_FOR_ROUNDING = [
    (0.1 + 0.2, 0.3),
    (sum([0.1] * 10), 1.0),
    (sum([1e-4] * 10_000), 1.0),  # Off by 9.4e-14.
    (0.1 + 0.2 - 0.3, 0.0),
    (0.0, -0.0),
    (1e12 / 3 * 3 + 1e-4, 1e12 + 1e-4, (1e12 + 1e-4) * (1 + 2**-50)),
    tuple(float(value) for value in (np.float32(0.1) * np.float32(3), np.float32(0.3))),
    (float(np.float32(0.1) + np.float32(0.7) + np.float32(0.1)), float(np.float32(0.9))),
]


@pytest.mark.parametrize("rewards", EQUAL_BUT_FOR_ROUNDING)
@pytest.mark.parametrize("name", ["group_mean", "group_mean_std", "rloo"])
def test_rewards_that_differ_by_rounding_are_equal(rewards: tuple[float, ...], name: AdvantageName) -> None:
    assert is_equal_group(rewards) and group_advantages(rewards, name) == [0.0] * len(rewards)


@pytest.mark.parametrize(
    "rewards",
    [
        (0.3, 0.3 + 1e-9),
        (1.0, 1.0 - 1e-6),
        (0.5, 0.5 + 1e-12),
        (2.0**53, 2.0**53 - 1),  # Whole numbers are exact.
        (5e6, 5e6 + 1),
        (1e12 + 0.5, 1e12),
        (0.0, 1.0, 0.0),
    ],
)
def test_rewards_that_differ_by_more_are_not_equal(rewards: tuple[float, ...]) -> None:
    assert not is_equal_group(rewards)
    assert max(group_advantages(rewards)) == pytest.approx(max(rewards) - math.fsum(rewards) / len(rewards), rel=1e-3)
