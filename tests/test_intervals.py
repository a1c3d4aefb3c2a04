"""Intervals of mean rewards against closed forms, a bootstrap over problems, and the truth of simulated rewards."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from drpo_megatron.intervals import HeldOut, reward_interval, share_interval, student_t_975, wilson_interval


def mean_of(scores: Sequence[Sequence[float]]) -> float:
    return math.fsum(score for some in scores for score in some) / sum(map(len, scores))


def test_wilson_interval_solves_its_quadratic() -> None:
    for share, count in [(0.3, 50), (0.5, 10), (0.03, 200)]:
        for end in wilson_interval(share, count):  # |p - end| = z sqrt(end (1 - end) / n)
            assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / count) ** 0.5, rel=1e-6)
    assert wilson_interval(0.0, 10)[0] == 0.0 and wilson_interval(1.0, 10)[1] == 1.0


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # From printed tables.
    [
        (1, 12.706),
        (2, 4.303),
        (4, 2.776),
        (5, 2.571),
        (6, 2.447),
        (9, 2.262),
        (29, 2.045),
        (120, 1.980),
        (10**6, 1.960),
    ],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t_975(freedom) == pytest.approx(quantile, abs=1.1e-3)


def test_with_one_sample_a_problem_the_interval_is_wilsons_over_problems() -> None:
    assert share_interval([1.0] * 30 + [0.0] * 70, samples=1) == pytest.approx(wilson_interval(0.3, 100))
    assert share_interval([1.0] * 9, samples=16) == wilson_interval(1.0, 9)


def test_the_interval_has_the_width_of_the_problems_variance() -> None:
    values = [0.25, 0.5, 0.75, 1.0] * 50
    # Variance between problems 0.078125, of the mean 0.078125 / 200; Wilson's corrections are small at n = 600.
    low, high = share_interval(values, samples=16)
    assert high - low == pytest.approx(2 * 1.972 * (0.078125 / 200) ** 0.5, rel=0.01)
    # Problems that are all alike: as many trials as samples.
    assert share_interval([0.5] * 10, samples=4) == wilson_interval(0.5, 40)


def test_two_rewards_have_wilsons_interval_on_the_line_between_them() -> None:
    """DAPO's -1 and 1, and 1 + 0.1 for the format against 0.1 for the format alone: the shares are the same."""
    shares = [[1.0, 1.0]] * 3 + [[0.0, 0.0]] * 6 + [[0.0, 1.0]]
    low, high = reward_interval(shares)
    for worst, best in [(-1.0, 1.0), (0.1, 1.1), (-0.5, 0.0), (0.0, 10.0)]:
        scores = [[worst + (best - worst) * share for share in some] for some in shares]
        expected = (worst + (best - worst) * low, worst + (best - worst) * high)
        assert reward_interval(scores) == pytest.approx(expected)
        assert worst <= expected[0] < mean_of(scores) < expected[1] <= best


@pytest.mark.parametrize(
    ("only", "other"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 1.0), (2.0, 0.0), (1.1, 0.0), (-0.1, 0.0), (1e-3, 0.0)]
)
def test_rewards_that_are_all_the_same_are_not_certain(only: float, other: float) -> None:
    """No wrong answer in ten: up to 27.8 % may be wrong, by Wilson's bound z^2 / (n + z^2)."""
    bound = 1.959964**2 / (10 + 1.959964**2)
    ends = sorted([only, only + bound * (other - only)])
    assert reward_interval([[only, only]] * 10) == pytest.approx(ends, rel=1e-6)


def test_rewards_of_any_range_have_students_interval_of_the_problems_means() -> None:
    # Means 5, 6, 7, 8, 9: s^2 = 2.5, s / sqrt 5 = 0.7071, t(4) = 2.776.
    assert reward_interval([[r, r] for r in (5.0, 6.0, 7.0, 8.0, 9.0)]) == pytest.approx(
        (7 - 2.776 * 0.70711, 7 + 2.776 * 0.70711), rel=1e-4
    )
    # Problems that are all alike: never narrower than independent samples. All 40: s^2 = 20/39 * 4/3 ... by numpy.
    alike = [[0.0, 1.0, 2.0, 3.0]] * 10
    half = student_t_975(9) * float(np.std(np.array(alike).ravel(), ddof=1)) / 40**0.5
    assert reward_interval(alike) == pytest.approx((1.5 - half, 1.5 + half))
    # One problem: the interval is of its own samples.
    assert reward_interval([[1.0, 2.0, 3.0]]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)


def test_a_bootstrap_over_problems_finds_the_same_interval() -> None:
    """Where problems are many, the bootstrap of whole problems (all their samples together) needs no formula."""
    rng = np.random.default_rng(0)
    quality = rng.gamma(2.0, 1.0, size=(400, 1))
    scores = quality + rng.normal(0.0, 2.0, size=(400, 4))
    means = scores.mean(axis=1)
    drawn = means[rng.integers(0, 400, size=(4000, 400))].mean(axis=1)
    low, high = reward_interval(scores.tolist())
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.1 * (high - low))


def _uniform_coins(rng: random.Random) -> list[list[float]]:
    """40 problems, each with its own chance (uniform, mean 1/2) and 8 samples."""
    return [[float(rng.random() < p) for _ in range(8)] for p in (rng.random() for _ in range(40))]


def _dapo_coins(rng: random.Random) -> list[list[float]]:
    """The same with -1 and 1: mean 0."""
    return [[2 * score - 1 for score in some] for some in _uniform_coins(rng)]


def _aime(rng: random.Random) -> list[list[float]]:
    """30 problems with 16 samples, most of them all wrong or all right: mean 0.3."""
    chances = [rng.betavariate(0.6, 1.4) for _ in range(30)]
    return [[float(rng.random() < p) for _ in range(16)] for p in chances]


def _any_range(rng: random.Random) -> list[list[float]]:
    """Mean 5: a problem's own level and its samples' noise, skewed."""
    levels = [rng.gammavariate(2.0, 2.0) for _ in range(40)]
    return [[level + rng.uniform(0.0, 2.0) for _ in range(4)] for level in levels]


@pytest.mark.parametrize(
    ("draw", "truth"), [(_uniform_coins, 0.5), (_dapo_coins, 0.0), (_aime, 0.3), (_any_range, 5.0)]
)
def test_the_interval_covers_the_truth_about_95_times_in_100(
    draw: Callable[[random.Random], list[list[float]]], truth: float
) -> None:
    rng = random.Random(0)
    covered = sum(low < truth < high for low, high in (reward_interval(draw(rng)) for _ in range(1000)))
    assert 925 < covered < 980  # 950 with a standard deviation of 7; the skewed ones are a little short of it.


def test_any_rewards_have_a_finite_interval_around_their_mean() -> None:
    rng = random.Random(1)
    for _ in range(500):
        size, samples = rng.randint(1, 6), rng.randint(1, 4)
        values = [rng.choice([-1.0, 0.0, 1.0, 0.1 + 0.2, 0.3, rng.uniform(-1e6, 1e6), 1e-300]) for _ in range(3)]
        scores = [[rng.choice(values) for _ in range(samples)] for _ in range(size)]
        low, high = reward_interval(scores)
        assert math.isfinite(low) and math.isfinite(high)
        slack = 1e-12 * max(1.0, *(abs(score) for some in scores for score in some))
        assert low - slack <= mean_of(scores) <= high + slack and low < high


def test_only_rewards_of_0_or_1_are_called_accuracy_and_shown_in_percent() -> None:
    accuracy = HeldOut(0.949, 0.927, 0.964, True)
    assert (accuracy.name, accuracy.text()) == ("accuracy", "94.9% (92.7% to 96.4%)")
    assert HeldOut.of({"step": 3} | accuracy.as_metrics()) == accuracy
    reward = HeldOut(-0.64, -0.72, -0.51, False)
    assert (reward.name, reward.text()) == ("mean reward", "-0.640 (-0.720 to -0.510)")
    assert HeldOut.of(reward.as_metrics()) == reward and "eval/accuracy" not in reward.as_metrics()
    old = HeldOut.of({"eval/accuracy": 0.5})
    assert old is not None and old.text() == "50.0%" and HeldOut.of({"reward/mean": 0.5}) is None
