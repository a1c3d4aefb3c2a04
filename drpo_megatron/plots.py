"""training.png: what a person looks at first after a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from drpo_megatron.files import writing
from drpo_megatron.intervals import MEAN, HeldOut
from drpo_megatron.sinks import METRICS_FILE, read_metrics


def draw_training(run_dir: Path) -> Path:
    """Training and held-out reward, entropy, |pi - mu|, and the range of the objective's weight, by step."""
    rows = read_metrics(run_dir / METRICS_FILE)
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, constrained_layout=True)
    reward, entropy, shift, weight = axes.flat

    _line(reward, rows, "reward/mean", "training reward")
    _heldout(reward, rows)
    rewards = [row[name] for row in rows for name in ("reward/mean", MEAN) if row.get(name) is not None]
    if all(0 <= value <= 1 for value in rewards):
        reward.set_ylim(0, 1.02)
    reward.set(title="Reward")
    _line(entropy, rows, "policy/entropy/mean", "mean")
    entropy.set(title="Entropy of the policy (nats a token)", ylim=(0, None))
    for name, label in (
        ("mismatch/abs_prob_shift/mean", "engine to trainer, mean"),
        ("mismatch/abs_prob_shift/p99", "engine to trainer, p99"),
        ("shift/abs_prob_shift/mean", "all optimiser steps, mean"),
        ("shift/abs_prob_shift/p99", "all optimiser steps, p99"),
    ):
        _line(shift, rows, name, label)
    shift.set(title="|pi - mu|", yscale="log")
    _band(weight, rows, "objective/weight/min", "objective/weight/max", "min to max")
    _line(weight, rows, "objective/weight/mean", "mean")
    weight.axhline(0, color="grey", linewidth=0.8)
    weight.set(title="Weight w of the policy gradient (below 0: corrective)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(run_dir.name)
    path = run_dir / "training.png"
    with writing(path, "wb") as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
    return path


def _heldout(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """A point an evaluation with its interval, called accuracy where all of them are."""
    points = [(row["step"], found) for row in rows if (found := HeldOut.of(row)) is not None]
    if not points:
        return
    name = "accuracy" if all(found.is_accuracy for _, found in points) else "mean reward"
    ends = [[found.mean - found.low for _, found in points], [found.high - found.mean for _, found in points]]
    steps, means = [step for step, _ in points], [found.mean for _, found in points]
    spread = [[max(0.0, value) if math.isfinite(value) else 0.0 for value in side] for side in ends]
    axis.errorbar(steps, means, yerr=spread, marker="o", linestyle="--", capsize=3, label=f"held-out {name}, 95 %")


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _line(axis: Axes, rows: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    steps, values = _series(rows, name)
    if steps:
        axis.plot(steps, values, label=label, **style)


def _band(axis: Axes, rows: list[dict[str, Any]], low: str, high: str, label: str) -> None:
    steps, lows = _series(rows, low)
    _, highs = _series(rows, high)
    if steps and len(lows) == len(highs):
        axis.fill_between(steps, lows, highs, alpha=0.3, label=label)
