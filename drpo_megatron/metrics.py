"""Statistics that know how they are reduced, and the sinks that receive them.

A metric is made where its data is, as a `Statistic`; micro-batches merge with `merge`, ranks with `reduce_over`.
Nothing downstream has to guess whether a number is a mean, a sum or a maximum, and masked tokens never enter one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

Kind = Literal["mean", "sum", "min", "max", "quantile", "effective_share", "decibels"]

NUM_BINS = 4096
"""Bins of a quantile sketch: 512 an octave-of-ten from 1e-8 to 1, so a quantile is within 0.5 % of the exact one."""
_LOWEST, _HIGHEST = 1e-8, 1.0


@dataclass(frozen=True, slots=True)
class Statistic:
    """One reducible number.

    `data` is FP64: [sum, count] for mean, [value] for sum, min and max, [NUM_BINS] counts for quantile,
    [sum, sum of squares, count] for effective_share, [signal, noise] for decibels. An empty one, other than a sum, has
    the value NaN.
    """

    kind: Kind
    data: torch.Tensor
    quantile: float = 0.0

    @staticmethod
    def mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> Statistic:
        values = values.detach().double()
        if weights is None:
            total, count = values.sum(), torch.tensor(float(values.numel()), device=values.device)
        else:
            weights = weights.detach().double()
            total, count = (values * weights).sum(), weights.sum()
        return Statistic("mean", torch.stack([total, count.double()]))

    @staticmethod
    def ratio(numerator: float, denominator: float) -> Statistic:
        return Statistic("mean", torch.tensor([numerator, denominator], dtype=torch.float64))

    @staticmethod
    def sum(values: torch.Tensor | float) -> Statistic:
        return Statistic("sum", torch.as_tensor(values, dtype=torch.float64).detach().sum().reshape(1))

    @staticmethod
    def min(values: torch.Tensor) -> Statistic:
        return _extreme("min", values)

    @staticmethod
    def max(values: torch.Tensor) -> Statistic:
        return _extreme("max", values)

    @staticmethod
    def of_quantile(values: torch.Tensor, quantile: float) -> Statistic:
        """Quantile of values in [0, 1] from a log-spaced histogram (mergeable over ranks, unlike a sorted list).

        NaN counts as the highest: a policy that diverged must show, and has its error elsewhere.
        """
        values = values.detach().double().nan_to_num(nan=_HIGHEST).clamp(_LOWEST, _HIGHEST)
        scaled = (values / _LOWEST).log() / math.log(_HIGHEST / _LOWEST)
        bins = (scaled * (NUM_BINS - 1)).round().long()
        return Statistic("quantile", torch.bincount(bins, minlength=NUM_BINS).double(), quantile)

    @staticmethod
    def effective_share(values: torch.Tensor) -> Statistic:
        """Effective sample size of importance ratios over their number, (sum r)^2 / (N sum r^2): 1 if all are equal."""
        values = values.detach().double()
        count = torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device)
        return Statistic("effective_share", torch.stack([values.sum(), values.square().sum(), count]))

    @staticmethod
    def decibels(signal: torch.Tensor, noise: torch.Tensor) -> Statistic:
        """10 log10 of signal over noise, both energies. Without any noise inf."""
        return Statistic("decibels", torch.stack([signal.detach().double(), noise.detach().double()]))

    def merge(self, other: Statistic) -> Statistic:
        if self.kind != other.kind:
            raise ValueError(f"cannot merge a {self.kind} with a {other.kind}")
        if self.kind == "min":
            data = torch.minimum(self.data, other.data)
        elif self.kind == "max":
            data = torch.maximum(self.data, other.data)
        else:
            data = self.data + other.data
        return Statistic(self.kind, data, self.quantile)

    def value(self) -> float:
        if self.kind == "mean":
            total, count = self.data.tolist()
            return total / count if count else float("nan")
        if self.kind == "quantile":
            count = self.data.sum()
            if not count:
                return float("nan")
            index = int(torch.searchsorted(self.data.cumsum(0), self.quantile * count).clamp(max=NUM_BINS - 1))
            return 0.0 if index == 0 else _LOWEST * (_HIGHEST / _LOWEST) ** (index / (NUM_BINS - 1))
        if self.kind == "decibels":
            signal, noise = self.data.tolist()
            if not signal:
                return float("nan")
            return 10 * math.log10(signal / noise) if noise else float("inf")
        if self.kind == "effective_share":
            total, squares, count = self.data.tolist()
            return total * total / (squares * count) if squares else float("nan")
        number = self.data.item()
        return float("nan") if self.kind in ("min", "max") and number in (float("inf"), -float("inf")) else number


def _extreme(kind: Literal["min", "max"], values: torch.Tensor) -> Statistic:
    values = values.detach().double()
    if values.numel() == 0:
        neutral = float("inf") if kind == "min" else -float("inf")
        return Statistic(kind, torch.tensor([neutral], dtype=torch.float64, device=values.device))
    return Statistic(kind, (values.min() if kind == "min" else values.max()).reshape(1))


def merge_all(parts: Iterable[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    """Merge the statistics of several micro-batches by name."""
    merged: dict[str, Statistic] = {}
    for part in parts:
        for name, statistic in part.items():
            merged[name] = merged[name].merge(statistic) if name in merged else statistic
    return merged


def reduce_over(statistics: Mapping[str, Statistic], group: dist.ProcessGroup | None) -> dict[str, Statistic]:
    """The same statistics over every rank of `group`, by one sum and one max all-reduce. All ranks give equal names."""
    if group is None or dist.get_world_size(group) == 1 or not statistics:
        return dict(statistics)
    names = sorted(statistics)
    summed = [n for n in names if statistics[n].kind not in ("min", "max")]
    extremes = [n for n in names if statistics[n].kind in ("min", "max")]
    reduced: dict[str, Statistic] = {}
    for chosen, op in ((summed, dist.ReduceOp.SUM), (extremes, dist.ReduceOp.MAX)):
        if not chosen:
            continue
        parts = [-statistics[n].data if statistics[n].kind == "min" else statistics[n].data for n in chosen]
        flat = torch.cat(parts)
        dist.all_reduce(flat, op=op, group=group)
        for name, piece in zip(chosen, flat.split([p.numel() for p in parts]), strict=True):
            was = statistics[name]
            reduced[name] = Statistic(was.kind, -piece if was.kind == "min" else piece, was.quantile)
    return reduced
