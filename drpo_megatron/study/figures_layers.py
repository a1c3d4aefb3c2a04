"""Pictures of the quantised layers: what survives the rounding, and routers that choose others in low precision."""

from __future__ import annotations

import math
import re
import statistics

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from drpo_megatron.study.results import Cell, Results, column_of

_LAYER = re.compile(r"precision/(layer_\d+)/([a-z0-9_]+)/(activation|weight|gradient)/sqnr_db")
_FLIPS = re.compile(r"precision/(layer_\d+)/router_flips")


def draw_heat_maps(results: Results) -> Figure | None:
    """Signal to noise and underflow of each operand: rows are layer, class and role; columns the precisions."""
    keys = sorted(metric for metric in results.metrics if _LAYER.fullmatch(metric))
    columns = [
        column for column in results.column_names if any(_mean(results, column, key) is not None for key in keys)
    ]
    if not columns:
        return None
    size = (max(8.0, 3.2 + 1.6 * len(columns)), 1.5 + 0.2 * len(keys))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, constrained_layout=True)
    panels = (("sqnr_db", "signal to noise, dB", "viridis"), ("underflow_share", "share rounded to 0", "magma_r"))
    for axis, (name, title, colors) in zip(axes, panels, strict=True):
        grid = [[_mean(results, column, key.replace("sqnr_db", name)) for column in columns] for key in keys]
        numbers = [[math.nan if value is None else value for value in line] for line in grid]
        image = axis.imshow(numbers, aspect="auto", cmap=colors, interpolation="nearest")
        axis.set_xticks(
            range(len(columns)), [column or "all" for column in columns], rotation=20, ha="right", fontsize=8
        )
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis)
    labels = [key.removeprefix("precision/").removesuffix("/sqnr_db").replace("/", " ") for key in keys]
    axes[0].set_yticks(range(len(keys)), labels, fontsize=7)
    return figure


def draw_flips(results: Results) -> Figure | None:
    """Share of tokens whose experts differ in a layer between low and high precision of the same weights."""
    keys = sorted(metric for metric in results.metrics if _FLIPS.fullmatch(metric))
    columns = [
        column for column in results.column_names if any(_mean(results, column, key) is not None for key in keys)
    ]
    if not columns:
        return None
    figure, axis = plt.subplots(figsize=(7, 3.4), constrained_layout=True)
    for column in columns:
        values = [_mean(results, column, key) or 0.0 for key in keys]
        axis.plot(range(len(keys)), values, "o-", label=column or "all")
    axis.set_xticks(range(len(keys)), [key.split("/")[1] for key in keys], fontsize=8)
    axis.set(ylabel="share of tokens", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _mean(results: Results, column: str, metric: str) -> float | None:
    """Over all steps, objectives and seeds of a column; None where it wasn't measured."""
    cells: list[Cell] = [cell for cell in results.cells if column_of(cell) == column]
    runs = [run for cell in cells for run in results.ended(cell)]
    values = [row[metric] for run in runs for row in run.rows if row.get(metric) is not None]
    return statistics.fmean(values) if values else None
