"""The mean of rewards with its 95 % interval, whatever range the rewards have, and how both are shown.

    all rewards 0 or 1         Wilson's interval; the mean is called accuracy
    two values a < b           Wilson's interval of the share of b, on the line from a to b (DAPO's -1 and 1, say)
    one value c                as two values: c and the one that is not seen, 0 (for c = 0 and c = -1: 1)
    anything else              Student's t interval of the problems' means

Samples of one problem are alike, so the problems are the independent draws and not the samples: what counts is how much
the problems' means spread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drpo_megatron.rounding import tolerance

Z_975 = 1.959963984540054
"""Quantile of the normal distribution."""
_T_975 = (12.7062, 4.3027, 3.1824, 2.7764)
"""Quantiles of Student's t for 1 to 4 degrees of freedom, where the expansion below is not good to 1e-3."""

MEAN, LOW, HIGH, ACCURACY = "eval/reward/mean", "eval/reward/low", "eval/reward/high", "eval/accuracy"
"""Metrics of an evaluation. ACCURACY is there only when every reward is 0 or 1."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What an evaluation during a run measured."""

    mean: float
    low: float
    """NaN in the metrics of runs that wrote no interval."""
    high: float
    is_accuracy: bool
    """Every reward is 0 or 1."""

    @property
    def name(self) -> str:
        return "accuracy" if self.is_accuracy else "mean reward"

    def text(self) -> str:
        """`0.949 (0.927 to 0.964)`, in % for accuracy."""
        form = ".1%" if self.is_accuracy else ".3f"
        mean, low, high = (format(value, form) for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})" if math.isfinite(self.low) and math.isfinite(self.high) else mean

    def as_metrics(self) -> dict[str, float]:
        metrics = {MEAN: self.mean, LOW: self.low, HIGH: self.high}
        return metrics | ({ACCURACY: self.mean} if self.is_accuracy else {})

    @staticmethod
    def of(row: Mapping[str, Any]) -> HeldOut | None:
        """From a row of metrics; None where nothing was evaluated."""
        mean = row.get(MEAN, row.get(ACCURACY))
        if mean is None:
            return None
        low, high = (math.nan if row.get(name) is None else row[name] for name in (LOW, HIGH))
        return HeldOut(mean, low, high, ACCURACY in row)


def all_zero_or_one(scores: Sequence[Sequence[float]]) -> bool:
    return {score for problem in scores for score in problem} <= {0.0, 1.0}


def reward_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % interval of the mean reward from the scores of every problem, equally many of each; at least one of one.

    A group's mean m of N problems with n samples each. The variance of m is that which the problems' means show, v / N, and
    never less than that of N n independent samples. Both ends are finite, and the mean lies between them.
    """
    values = _distinct([score for problem in scores for score in problem])
    samples = len(scores[0])
    means = [math.fsum(problem) / samples for problem in scores]
    if len(values) > 2:
        return _t_interval(scores, means)
    low, high = _ends(values)
    shares = [min(1.0, max(0.0, (mean - low) / (high - low))) for mean in means]
    return tuple(low + (high - low) * end for end in share_interval(shares, samples))  # type: ignore[return-value]


def _distinct(scores: Sequence[float]) -> list[float]:
    """Ascending, those that differ by more than rounding."""
    limit = tolerance(scores)
    found: list[float] = []
    for score in sorted(set(scores)):
        if not found or score - found[-1] > limit:
            found.append(score)
    return found


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The two values that rewards can have, from the one or two that were seen."""
    if len(values) == 2:
        return values[0], values[1]
    (only,) = values
    other = 1.0 if only in (0.0, -1.0) else 0.0
    return min(only, other), max(only, other)


def _t_interval(scores: Sequence[Sequence[float]], means: Sequence[float]) -> tuple[float, float]:
    count, samples = len(means), len(scores[0])
    mean = math.fsum(means) / count
    everything = [score for problem in scores for score in problem]
    between = _variance(means, mean) / count if count > 1 else 0.0
    variance = max(between, _variance(everything, mean) / (count * samples))
    half = student_t_975(count - 1 if count > 1 else samples - 1) * math.sqrt(variance)
    return mean - half, mean + half


def _variance(values: Sequence[float], mean: float) -> float:
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def share_interval(values: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean of problems' values in [0, 1], each estimated from `samples` samples.

    Wilson's interval with the effective number of trials n = m (1 - m) / (v / N), which has the variance v / N of the
    mean that the problems show (Korn and Graubard's use of it for clustered samples). One sample a problem: v = m (1 - m),
    plain Wilson over problems. Several: narrower, as far as problems differ less than coins would; v is an estimate
    then, for which n shrinks by (z / t)^2 of N - 1 degrees of freedom. Never more trials than samples, and where all
    values are 0, or all 1, as many as problems.
    """
    count = len(values)
    mean = min(1.0, max(0.0, math.fsum(values) / count))
    variance = math.fsum((value - mean) ** 2 for value in values) / count
    if mean in (0.0, 1.0):
        return wilson_interval(mean, count)
    most = float(count * samples)
    if samples == 1 or not variance:
        return wilson_interval(mean, count if samples == 1 else most)
    shrink = (Z_975 / student_t_975(count - 1)) ** 2
    return wilson_interval(mean, min(most, shrink * mean * (1 - mean) * count / variance))


def wilson_interval(share: float, count: float, z: float = Z_975) -> tuple[float, float]:
    """Wilson's score interval of a share over `count` independent trials."""
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def student_t_975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with `freedom` >= 1 degrees of freedom, good to 1e-3.

    From 5 on Fisher and Cornish's expansion around the normal quantile (Abramowitz and Stegun 26.7.5).
    """
    if freedom <= len(_T_975):
        return _T_975[freedom - 1]
    z = Z_975
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
