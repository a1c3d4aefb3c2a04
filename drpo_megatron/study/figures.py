"""Pictures of a study: a panel for each combination of all axes but the first, a colour for each level of the first.

Lines are means over seeds, the band behind them is from the smallest seed to the largest. A figure is left out when no
run has its metric.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drpo_megatron.intervals import MEAN
from drpo_megatron.study.claims import collapsed
from drpo_megatron.study.figures_layers import draw_flips, draw_heat_maps
from drpo_megatron.study.figures_tokens import draw_stopped, draw_weights
from drpo_megatron.study.results import FINAL, MISMATCH, SHIFT, Result, Results, column_of, row_of

_PANELS_A_ROW = 4
_WINDOW, _HISTORY = 5, 5
"""Steps of the early-warning curve: the mean of so many against the median of all before, of which there are at least
so many."""


@dataclass(frozen=True, slots=True)
class Picture:
    title: str
    caption: str
    figure: Figure


def draw_all(results: Results) -> Iterator[Picture]:
    """One at a time, in the order of the report. The caller closes each figure."""
    for title, caption, draw in _PICTURES:
        if (figure := draw(results)) is not None:
            yield Picture(title, caption, figure)


# --- curves ---------------------------------------------------------------------------------------------------------


def _curves(metric: str, *, log: bool = False, share: bool = False) -> Callable[[Results], Figure | None]:
    def draw(results: Results) -> Figure | None:
        if not results.has(metric):
            return None
        return _panels(
            results, lambda axis, row, runs: _draw_metric(axis, results, row, runs), log, share and results.is_accuracy
        )

    def _draw_metric(axis: Axes, results: Results, row: str, runs: list[Result]) -> None:
        _draw_band(axis, [_series(run, metric) for run in runs], row, results.color(row))

    return draw


def _panels(
    results: Results, draw: Callable[[Axes, str, list[Result]], None], log: bool = False, share: bool = False
) -> Figure:
    columns = results.column_names
    width = min(len(columns), _PANELS_A_ROW)
    height = math.ceil(len(columns) / width)
    size = (max(3.4 * width, 5), 2.9 * height + 0.5)
    figure, grid = plt.subplots(height, width, figsize=size, sharey=True, squeeze=False, constrained_layout=True)
    for axis in grid.flat[len(columns) :]:
        axis.set_visible(False)
    handles: dict[str, Artist] = {}
    for axis, column in zip(grid.flat, columns, strict=False):
        for row in results.row_names:
            cell = results.at(row, column)
            if cell is not None and (runs := results.ended(cell)):
                draw(axis, row, runs)
        axis.set_title(column, fontsize=9)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        if log:
            axis.set_yscale("log")
        if share:
            axis.set_ylim(0, 1.02)
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _draw_band(axis: Axes, series: list[dict[int, float]], label: str, color: str) -> None:
    steps = sorted({step for points in series for step in points})
    found = [[points[step] for points in series if step in points] for step in steps]
    axis.plot(steps, [statistics.fmean(values) for values in found], label=label, color=color, linewidth=1.3)
    if len(series) > 1:
        axis.fill_between(steps, [min(v) for v in found], [max(v) for v in found], color=color, alpha=0.15)


def _series(run: Result, metric: str) -> dict[int, float]:
    return {row["step"]: row[metric] for row in run.rows if row.get(metric) is not None}


def _weights(results: Results) -> Figure | None:
    """The range of w in each step, and its mean."""
    low, mean, high = (f"objective/weight/{name}" for name in ("min", "mean", "max"))
    if not results.has(low):
        return None

    def draw(axis: Axes, row: str, runs: list[Result]) -> None:
        color = results.color(row)
        lows, highs = (_series(runs[0], metric) for metric in (low, high))
        steps = sorted(lows.keys() & highs.keys())
        axis.fill_between(steps, [lows[s] for s in steps], [highs[s] for s in steps], color=color, alpha=0.12)
        _draw_band(axis, [_series(run, mean) for run in runs], row, color)
        axis.axhline(0, color="grey", linewidth=0.8)

    return _panels(results, draw)


def _early_warning(results: Results) -> Figure | None:
    """Growth of the mismatch against its own history; dashed where the runs collapsed."""
    if not results.has(MISMATCH.metric):
        return None

    def draw(axis: Axes, row: str, runs: list[Result]) -> None:
        for run in runs:
            values = _series(run, MISMATCH.metric)
            steps = sorted(values)
            growth = {}
            for index in range(_HISTORY + _WINDOW, len(steps) + 1):
                past = statistics.median(values[step] for step in steps[: index - _WINDOW])
                recent = statistics.fmean(values[step] for step in steps[index - _WINDOW : index])
                growth[steps[index - 1]] = recent / past if past else math.nan
            style = "--" if collapsed(results, run) else "-"
            axis.plot(list(growth), list(growth.values()), style, color=results.color(row), label=row, linewidth=1.2)
        axis.axhline(1, color="grey", linewidth=0.8)

    return _panels(results, draw, log=True)


# --- one number a run -----------------------------------------------------------------------------------------------


def _phase_diagram(results: Results) -> Figure | None:
    """What was reached at the end, over the whole grid."""
    if not results.has(FINAL.metric):
        return None
    rows, columns = results.row_names, results.column_names
    grid = [[math.nan] * len(columns) for _ in rows]
    for cell in results.cells:
        if values := results.values(cell, FINAL):
            grid[rows.index(row_of(cell))][columns.index(column_of(cell))] = statistics.fmean(values.values())
    figure, axis = plt.subplots(figsize=(1.5 * len(columns) + 3, 0.5 * len(rows) + 1.8), constrained_layout=True)
    image = axis.imshow(grid, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=20, ha="right")
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    form = "{:.1%}" if results.is_accuracy else "{:.3f}"
    middle = statistics.fmean(image.get_clim())
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if math.isfinite(value):
                color = "black" if value > middle else "white"
                axis.text(x, y, form.format(value), ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, ax=axis)
    return figure


def _mismatch_against_movement(results: Results) -> Figure | None:
    """Each run: what lies between engine and trainer, against what lies there after all optimiser steps."""
    if not (results.has(MISMATCH.metric) and results.has(SHIFT.metric)):
        return None
    figure, axis = plt.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    markers = "osD^v<>Pp*hX"
    for cell in results.cells:
        marker = markers[results.column_names.index(column_of(cell)) % len(markers)]
        for run in results.ended(cell):
            mismatch, shift = MISMATCH.of(run.rows), SHIFT.of(run.rows)
            if mismatch is not None and shift is not None:
                fill = "none" if collapsed(results, run) else "full"
                axis.plot(mismatch, shift, marker, fillstyle=fill, color=results.color(row_of(cell)))
    for row in results.row_names:
        axis.plot([], [], "o", color=results.color(row), label=row)
    for index, column in enumerate(results.column_names if len(results.column_names) > 1 else []):
        axis.plot([], [], markers[index % len(markers)], color="grey", label=column)
    axis.set(xscale="log", yscale="log", xlabel="mismatch: mean |pi_old - mu|", ylabel="all steps: mean |pi - mu|")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


_PICTURES: tuple[tuple[str, str, Callable[[Results], Figure | None]], ...] = (
    (
        "Phase diagram",
        "Held-out at the end, mean over seeds: accuracy, or mean reward where not 0 or 1.",
        _phase_diagram,
    ),
    (
        "Held-out reward",
        "Accuracy where rewards are 0 or 1. Sampled as in training, in the cell's own rollout precision.",
        _curves(MEAN, share=True),
    ),
    ("Reward", "Mean of each rollout.", _curves("reward/mean", share=True)),
    (
        "Mismatch against movement",
        "A marker a run; hollow: it collapsed. On the diagonal all of |pi - mu| is the engine's mismatch; above it, the "
        "policy's own movement over the optimiser steps of a rollout.",
        _mismatch_against_movement,
    ),
    ("Mismatch", "Mean |pi_old - mu| before the first update.", _curves("mismatch/abs_prob_shift/mean", log=True)),
    ("Drift", "Mean |pi - pi_old|, where pi_old is known.", _curves("drift/abs_prob_shift/mean", log=True)),
    (
        "Early warning",
        f"Mismatch, mean of the last {_WINDOW} steps over the median of all before; dashed: the run collapsed.",
        _early_warning,
    ),
    ("Weights", "w of the policy gradient: mean over tokens, and the range of the first seed behind it.", _weights),
    (
        "Weights and tokens",
        "w as the objective computes it, line: A > 0, dashed: A < 0; right: the tokens of all steps and cells by w.",
        draw_weights,
    ),
    ("Stopped tokens", "Clipped, masked or turned round (w <= 0), by the engine's probability of them.", draw_stopped),
    ("Tokens that were corrected", "Share with w < 0.", _curves("objective/beyond_boundary_share")),
    ("Entropy", "Of the policy, nats a token.", _curves("policy/entropy/mean")),
    ("Gradient norm", "Before clipping.", _curves("optim/grad_norm", log=True)),
    ("Quantised operands", "Means over steps and runs.", draw_heat_maps),
    ("Router flips", "Tokens whose experts differ between low and high precision, by layer.", draw_flips),
)
