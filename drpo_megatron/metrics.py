"""Statistics that know how they are reduced, and the sinks that receive them.

A metric is made where its data is, as a `Statistic`, and stays there: on a GPU nothing here waits for the device.
Micro-batches merge as `PackedStatistics`, two flat tensors; ranks reduce those; `unpack` copies to the host, once.
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
        """What has weight 0 (or False) may be anything, NaN too."""
        values = values.detach().double()
        if weights is None:
            return Statistic("mean", torch.stack([values.sum(), _count(values)]))
        weights = weights.detach().double()
        return Statistic("mean", torch.stack([(_where(weights != 0, values, 0.0) * weights).sum(), weights.sum()]))

    @staticmethod
    def ratio(numerator: float, denominator: float) -> Statistic:
        return Statistic("mean", torch.tensor([numerator, denominator], dtype=torch.float64))

    @staticmethod
    def sum(values: torch.Tensor | float) -> Statistic:
        return Statistic("sum", torch.as_tensor(values, dtype=torch.float64).detach().sum().reshape(1))

    @staticmethod
    def min(values: torch.Tensor, chosen: torch.Tensor | None = None) -> Statistic:
        """Of the values that the bool mask `chosen` names; None: of all."""
        return _extreme("min", values, chosen)

    @staticmethod
    def max(values: torch.Tensor, chosen: torch.Tensor | None = None) -> Statistic:
        return _extreme("max", values, chosen)

    @staticmethod
    def of_quantile(values: torch.Tensor, quantile: float) -> Statistic:
        """Quantile of values in [0, 1] from a log-spaced histogram (mergeable over ranks, unlike a sorted list).

        NaN counts as the highest: a policy that diverged must show, and has its error elsewhere.
        """
        values = values.detach().double().nan_to_num(nan=_HIGHEST).clamp(_LOWEST, _HIGHEST)
        scaled = (values / _LOWEST).log() / math.log(_HIGHEST / _LOWEST)
        bins = (scaled * (NUM_BINS - 1)).round().long()
        return Statistic("quantile", counted(bins, NUM_BINS), quantile)

    @staticmethod
    def effective_share(values: torch.Tensor) -> Statistic:
        """Effective sample size of importance ratios over their number, (sum r)^2 / (N sum r^2): 1 if all are equal."""
        values = values.detach().double()
        return Statistic("effective_share", torch.stack([values.sum(), values.square().sum(), _count(values)]))

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


def counted(bins: torch.Tensor, num_bins: int, chosen: torch.Tensor | None = None) -> torch.Tensor:
    """[num_bins] FP64, how often each bin occurs among `chosen` (bool): torch.bincount makes the host wait for a GPU."""
    ones = torch.ones_like(bins, dtype=torch.float64) if chosen is None else chosen.double()
    return ones.new_zeros(num_bins).scatter_add_(0, bins, ones)


def _count(values: torch.Tensor) -> torch.Tensor:
    return values.new_full((), float(values.numel()))


def _where(chosen: torch.Tensor, values: torch.Tensor, otherwise: float) -> torch.Tensor:
    return torch.where(chosen, values, values.new_full((), otherwise))


def _extreme(kind: Literal["min", "max"], values: torch.Tensor, chosen: torch.Tensor | None) -> Statistic:
    values = values.detach().double()
    neutral = float("inf") if kind == "min" else -float("inf")
    if values.numel() == 0:
        return Statistic(kind, values.new_full((1,), neutral))
    if chosen is not None:
        values = _where(chosen, values, neutral)
    return Statistic(kind, (values.min() if kind == "min" else values.max()).reshape(1))


def merge_all(parts: Iterable[Mapping[str, Statistic]]) -> dict[str, Statistic]:
    """Merge the statistics of several micro-batches by name."""
    merged: dict[str, Statistic] = {}
    for part in parts:
        for name, statistic in part.items():
            merged[name] = merged[name].merge(statistic) if name in merged else statistic
    return merged


@dataclass(frozen=True, slots=True)
class PackedStatistics:
    """Statistics of many names as two flat FP64 tensors on one device: what is added up, and what the largest is of."""

    layout: tuple[tuple[str, Kind, float, int], ...]
    """(name, kind, quantile, numbers), those that are added up first."""
    sums: torch.Tensor
    extremes: torch.Tensor
    """Minima are negated."""

    @staticmethod
    def of(statistics: Mapping[str, Statistic]) -> PackedStatistics:
        """At least one. Tensors must share a device."""
        names = sorted(statistics, key=lambda name: (statistics[name].kind in ("min", "max"), name))
        layout = tuple(
            (name, statistics[name].kind, statistics[name].quantile, statistics[name].data.numel()) for name in names
        )
        summed = [statistics[name].data for name, kind, *_ in layout if kind not in ("min", "max")]
        extremes = [
            -statistics[name].data if kind == "min" else statistics[name].data
            for name, kind, *_ in layout
            if kind in ("min", "max")
        ]
        nothing = next(iter(statistics.values())).data.new_empty(0)
        return PackedStatistics(layout, torch.cat([nothing, *summed]), torch.cat([nothing, *extremes]))

    def merge(self, other: PackedStatistics) -> PackedStatistics:
        """Raises: ValueError for different names: micro-batches give the same, and empty ones where they have no token."""
        if self.layout != other.layout:
            names = {name for name, *_ in self.layout} ^ {name for name, *_ in other.layout}
            raise ValueError(f"statistics of different names or kinds can't be merged: {sorted(names)}")
        return PackedStatistics(self.layout, self.sums + other.sums, torch.maximum(self.extremes, other.extremes))

    def reduce_over(self, group: dist.ProcessGroup) -> PackedStatistics:
        """Over every rank of `group`, by one sum and one max all-reduce. All ranks give equal names.

        The tensors must be where the group's backend takes them: on the GPU for NCCL.
        """
        if dist.get_world_size(group) == 1:
            return self
        sums, extremes = self.sums.clone(), self.extremes.clone()
        for flat, op in ((sums, dist.ReduceOp.SUM), (extremes, dist.ReduceOp.MAX)):
            if flat.numel():
                dist.all_reduce(flat, op=op, group=group)
        return PackedStatistics(self.layout, sums, extremes)

    def unpack(self) -> dict[str, Statistic]:
        """On the host, in one copy."""
        pieces = torch.cat([self.sums, self.extremes]).cpu().split([numbers for *_, numbers in self.layout])
        return {
            name: Statistic(kind, -piece if kind == "min" else piece, quantile)
            for (name, kind, quantile, _), piece in zip(self.layout, pieces, strict=True)
        }


def reduce_over(statistics: Mapping[str, Statistic], *groups: dist.ProcessGroup) -> dict[str, Statistic]:
    """The same statistics over every rank of the groups, one after another; the result is on the host."""
    if not statistics:
        return {}
    packed = PackedStatistics.of(statistics)
    for group in groups:
        packed = packed.reduce_over(group)
    return packed.unpack()
