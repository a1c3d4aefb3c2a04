"""Where the weights of tokens lie, and which tokens have none left: shares of tokens by fixed bins, mergeable.

    objective/weight_share/<bin>               of w
    objective/ratio_weight_share/<bin>         of r w, the multiplier of A grad log pi
    objective/stopped_share/<sign>/mu_<bin>    of the tokens with A of that sign and mu in that bin: those with w <= 0,
                                               which an objective clips, masks or, beyond its boundary, turns round

Bins contain their lower edge. Of tokens with an advantage other than 0 only: the others have no update to weigh.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drpo_megatron.metrics import Statistic, counted
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio

WEIGHT_EDGES = (-1.0, 0.0, 0.5, 0.9, 1.1, 2.0)
RATIO_WEIGHT_EDGES = (-1.0, 0.0, 0.5, 0.9, 1.1, 2.0, 10.0)
MU_EDGES = (0.01, 0.1, 0.5, 0.9)


def weight_histograms(inputs: ObjectiveInputs, outputs: ObjectiveOutputs) -> dict[str, Statistic]:
    """Statistics of the live tokens of one micro-batch; of the same names, and empty, if there are none."""
    acts, weight = inputs.advantages != 0, outputs.weight
    statistics = _shares("objective/weight_share/", weight, WEIGHT_EDGES, acts)
    ratio_weight = weight * log_ratio(inputs).exp()
    statistics |= _shares("objective/ratio_weight_share/", ratio_weight, RATIO_WEIGHT_EDGES, acts)
    bins, names = _bins(inputs.behavior_logprobs.exp(), MU_EDGES), bin_names(MU_EDGES)
    for sign, chosen in (("positive", inputs.advantages > 0), ("negative", inputs.advantages < 0)):
        totals = counted(bins, len(names), chosen)
        stopped = counted(bins, len(names), chosen & (weight <= 0))
        for name, pair in zip(names, torch.stack([stopped, totals], dim=1), strict=True):
            statistics[f"objective/stopped_share/{sign}/mu_{name}"] = Statistic("mean", pair)
    return statistics


def bin_names(edges: Sequence[float]) -> list[str]:
    """`below_-1`, `-1_to_0`, ..., `above_2`."""
    inner = [f"{low:g}_to_{high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    return [f"below_{edges[0]:g}", *inner, f"above_{edges[-1]:g}"]


def _shares(prefix: str, values: torch.Tensor, edges: Sequence[float], chosen: torch.Tensor) -> dict[str, Statistic]:
    names = bin_names(edges)
    counts = counted(_bins(values, edges), len(names), chosen)
    pairs = torch.stack([counts, counts.sum().expand_as(counts)], dim=1)
    return {prefix + name: Statistic("mean", pair) for name, pair in zip(names, pairs, strict=True)}


def _bins(values: torch.Tensor, edges: Sequence[float]) -> torch.Tensor:
    """The number of edges at or below each value; NaN is above all. Edges are numbers to compare with, not a tensor: a
    GPU would have to be sent one."""
    bins = torch.zeros_like(values, dtype=torch.int64)
    for edge in edges:
        bins += ~(values < edge)
    return bins
