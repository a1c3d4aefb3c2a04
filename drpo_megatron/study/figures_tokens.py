"""Pictures of what an objective does to tokens: its weight as a curve, where the run's weights lay, whom it stops."""

from __future__ import annotations

import statistics
import warnings

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo_megatron.objectives import build
from drpo_megatron.objectives.base import ObjectiveInputs
from drpo_megatron.objectives.histograms import MU_EDGES, WEIGHT_EDGES, bin_names
from drpo_megatron.study.results import Result, Results, row_of

_MUS = (0.05, 0.5)
_WITHOUT_ENGINE = {"anchor": "rollout", "correction": None, "kl_ref": None}
"""A curve is of pi and mu alone."""


def draw_weights(results: Results) -> Figure | None:
    """w against pi for two mu, and the run's own tokens by w."""
    names = bin_names(WEIGHT_EDGES)
    if not results.has(f"objective/weight_share/{names[0]}"):
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    for axis, mu in zip(axes, _MUS, strict=False):
        _draw_curves(axis, results, mu)
    axes[1].legend(fontsize=8)
    rows = [row for row in results.row_names if _runs(results, row)]
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        heights = [_mean(results, row, f"objective/weight_share/{name}") for name in names]
        positions = [bin_index + width * index for bin_index in range(len(names))]
        axes[2].bar(positions, heights, width, color=results.color(row), label=row)
    axes[2].set_xticks([index + 0.4 for index in range(len(names))], [name.replace("_", " ") for name in names])
    axes[2].tick_params(labelsize=7, rotation=30)
    axes[2].set(title="the runs' own tokens", xlabel="w", ylabel="share", yscale="log")
    return figure


def draw_stopped(results: Results) -> Figure | None:
    """Share of tokens with w <= 0 by mu and by the sign of the advantage, over all steps and cells."""
    names = bin_names(MU_EDGES)
    if not results.has(f"objective/stopped_share/positive/mu_{names[0]}"):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, constrained_layout=True)
    for axis, sign in zip(axes, ("positive", "negative"), strict=True):
        for row in results.row_names:
            if _runs(results, row):
                shares = [_mean(results, row, f"objective/stopped_share/{sign}/mu_{name}") for name in names]
                axis.plot(range(len(names)), shares, "o-", color=results.color(row), label=row)
        axis.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
        axis.set(title=f"{sign} advantage", xlabel="mu of the token")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share with w <= 0")
    axes[0].legend(fontsize=8)
    return figure


def _draw_curves(axis: Axes, results: Results, mu: float) -> None:
    """As the objective itself computes it, for a token with A > 0 (line) and with A < 0 (dashed)."""
    pi = torch.linspace(0.005, 0.995, 199)
    behavior = torch.full_like(pi, mu).log()
    for row in results.row_names:
        for run in _runs(results, row)[:1]:
            with warnings.catch_warnings(action="ignore"):  # The study has warned of such a delta.
                objective = build(run.config["objective"] | _WITHOUT_ENGINE)
            if objective.sequence_level or objective.num_topk:
                continue
            for sign, style in ((1.0, "-"), (-1.0, "--")):
                advantages = torch.full_like(pi, sign)
                inputs = ObjectiveInputs(pi.log(), behavior, advantages, behavior, torch.ones_like(pi))
                weight = objective(inputs).weight
                label = row if sign > 0 else None
                axis.plot(pi, weight, style, color=results.color(row), linewidth=1.2, label=label)
    axis.axvline(mu, color="grey", linewidth=0.8)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(title=f"mu = {mu:g}", xlabel="pi", ylabel="w", ylim=(-2.1, 2.6))
    axis.grid(alpha=0.3)


def _runs(results: Results, row: str) -> list[Result]:
    return [run for cell in results.cells if row_of(cell) == row for run in results.ended(cell)]


def _mean(results: Results, row: str, metric: str) -> float:
    """Over all steps and runs; 0 where no token was in the bin."""
    values = [line[metric] for run in _runs(results, row) for line in run.rows if line.get(metric) is not None]
    return statistics.fmean(values) if values else 0.0
