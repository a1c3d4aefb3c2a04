"""Numbers of the runs of a study, as their metrics.jsonl and summary.json have them, and what can't be concluded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from drpo_megatron.files import write_text
from drpo_megatron.intervals import ACCURACY, MEAN
from drpo_megatron.reading import read_json_as, read_text, read_yaml
from drpo_megatron.sinks import METRICS_FILE, read_metrics
from drpo_megatron.study.cells import Record, read_record
from drpo_megatron.study.file import Cell, StudyFile, checked_study, expand
from drpo_megatron.study.runs import PREPARE, Study

GRID_FILE = "study.json"
"""The study, with the seeds of all commands that ran it."""

Rows = list[dict[str, Any]]

REWARD = "reward"
"""Form of a measure that is a share, in %, when every held-out reward of the study is 0 or 1, and else any number."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a run: a metric, and how its steps become one."""

    label: str
    metric: str
    reduce: Callable[[Sequence[float]], float]
    form: str = ".3g"
    """Of `format`, or REWARD."""

    def of(self, rows: Rows) -> float | None:
        """None where the run doesn't have the metric."""
        values = [row[self.metric] for row in rows if row.get(self.metric) is not None]
        return self.reduce(values) if values else None


def first(values: Sequence[float]) -> float:
    return values[0]


def last(values: Sequence[float]) -> float:
    return values[-1]


def tail(values: Sequence[float]) -> float:
    """Mean of the last quarter."""
    return statistics.fmean(values[-math.ceil(len(values) / 4) :])


def growth(values: Sequence[float]) -> float:
    """Mean of the last quarter over that of the first."""
    size = math.ceil(len(values) / 4)
    head = statistics.fmean(values[:size])
    return statistics.fmean(values[-size:]) / head if head else math.nan


BEFORE = Measure("held-out before RL", MEAN, first, REWARD)
FINAL = Measure("held-out at the end", MEAN, last, REWARD)
BEST = Measure("held-out, best", MEAN, max, REWARD)
MISMATCH = Measure("mismatch: mean abs(pi_old - mu)", "mismatch/abs_prob_shift/mean", statistics.fmean)
SHIFT = Measure("all steps: mean abs(pi - mu)", "shift/abs_prob_shift/mean", statistics.fmean)
GROUPS = (
    (
        "What was learnt",
        "Held-out problems are sampled as in training: by the engine in the cell's own rollout precision.",
        (
            BEFORE,
            BEST,
            FINAL,
            Measure("reward, last quarter", "reward/mean", tail, REWARD),
            Measure("entropy, last quarter (nats)", "policy/entropy/mean", tail, ".3f"),
            Measure("gradient norm", "optim/grad_norm", statistics.fmean, ".2f"),
        ),
    ),
    (
        "How far engine and trainer are apart",
        "Mismatch: before the first optimiser step on a rollout. Drift: what the optimiser steps on it moved, where "
        "pi_old is known (anchor: recompute). All steps: both together. Means over the run's steps.",
        (
            MISMATCH,
            Measure("growth of it", "mismatch/abs_prob_shift/mean", growth, ".2f"),
            Measure("mismatch: mean exp abs(log r)", "mismatch/token_mult_prob_error", statistics.fmean, ".3f"),
            Measure("mismatch: k3", "mismatch/k3", statistics.fmean, ".1e"),
            Measure("drift: mean abs(pi - pi_old)", "drift/abs_prob_shift/mean", statistics.fmean),
            SHIFT,
            Measure("all steps: k3", "shift/k3", statistics.fmean, ".1e"),
            Measure("effective sample share", "shift/effective_sample_share", statistics.fmean, ".3f"),
            Measure("gradient, cosine to high precision", "precision/gradient_cosine/all", statistics.fmean, ".4f"),
            Measure("router flips", "precision/router_flips/mean", statistics.fmean, ".2%"),
            Measure("rollout staleness, largest", "rollout/staleness/max", max, ".0f"),
        ),
    ),
    (
        "What the objective did to tokens",
        "w is the weight that a token's policy gradient is multiplied by: below 0 it is corrected.",
        (
            Measure("corrected (w < 0)", "objective/beyond_boundary_share", statistics.fmean, ".2%"),
            Measure("outside abs(pi - mu) = delta", "objective/outside_trust_region_share", statistics.fmean, ".2%"),
            Measure("clipped or masked (w = 0)", "objective/clipped_share", statistics.fmean, ".2%"),
            Measure("smallest w", "objective/weight/min", min, ".2f"),
            Measure("largest w", "objective/weight/max", max, ".2f"),
        ),
    ),
)
"""The report's tables: title, note, columns."""


@dataclass(frozen=True, eq=False)
class Result:
    """A run of the grid as far as it came."""

    cell: Cell
    seed: int
    path: Path
    record: Record | None

    @cached_property
    def rows(self) -> Rows:
        """Rows of runs from before there was a mean reward have an accuracy alone, which is one."""
        rows = read_metrics(self.path / METRICS_FILE)
        return [row | {MEAN: row[ACCURACY]} if ACCURACY in row else row for row in rows]

    @cached_property
    def config(self) -> dict[str, Any]:
        tree = read_yaml(self.path / "config.yaml")
        if not isinstance(tree, dict) or not all(
            isinstance(tree.get(name), dict) for name in ("eval", "data", "rollout")
        ):
            raise ValueError(f"{self.path / 'config.yaml'} is no configuration of a run; restore it, or remove the run")
        return tree

    @property
    def has_ended(self) -> bool:
        """All steps are done, or it diverged."""
        return self.record is not None and (self.diverged or (self.path / "summary.json").is_file())

    @property
    def diverged(self) -> bool:
        return self.record is not None and self.record.state == "diverged"

    @property
    def state(self) -> str:
        return "not run" if self.record is None else self.record.state


@dataclass(frozen=True, eq=False)
class Results:
    file: StudyFile
    path: Path
    cells: tuple[Cell, ...]
    runs: tuple[Result, ...]
    """The whole grid with every seed, what isn't finished included."""
    starts: tuple[Record, ...]

    def ended(self, cell: Cell) -> list[Result]:
        """Runs whose numbers count: those that did all their steps, and those that diverged."""
        return [run for run in self.runs if run.cell is cell and run.has_ended]

    def values(self, cell: Cell, measure: Measure) -> dict[int, float]:
        """Seed -> number, of ended runs that have it."""
        found = {run.seed: measure.of(run.rows) for run in self.ended(cell)}
        return {seed: value for seed, value in found.items() if value is not None and math.isfinite(value)}

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Names of all that any ended run measured."""
        rows = [row for run in self.runs if run.has_ended for row in run.rows]
        return frozenset(name for row in rows for name, value in row.items() if value is not None)

    def has(self, metric: str) -> bool:
        return metric in self.metrics

    @cached_property
    def is_accuracy(self) -> bool:
        """Every reward of every held-out evaluation is 0 or 1, so that their mean is an accuracy."""
        rows = [row for run in self.runs if run.has_ended for row in run.rows if row.get(MEAN) is not None]
        return all(ACCURACY in row for row in rows)

    @property
    def heldout_name(self) -> str:
        return "accuracy" if self.is_accuracy else "mean reward"

    def form(self, measure: Measure) -> str:
        """Of `format`."""
        return (".1%" if self.is_accuracy else ".3f") if measure.form == REWARD else measure.form

    @property
    def row_names(self) -> list[str]:
        """Levels of the first axis: rows of tables, lines of figures."""
        return list(next(iter(self.file.axes.values())))

    @property
    def column_names(self) -> list[str]:
        """Combinations of the other axes' levels; one empty name if there is no other axis."""
        return list(dict.fromkeys(column_of(cell) for cell in self.cells))

    def color(self, row: str) -> str:
        """In all pictures the same."""
        return f"C{self.row_names.index(row) % 10}"

    def at(self, row: str, column: str) -> Cell | None:
        return next((cell for cell in self.cells if (row_of(cell), column_of(cell)) == (row, column)), None)


def row_of(cell: Cell) -> str:
    return next(iter(cell.levels.values()))


def column_of(cell: Cell) -> str:
    return "+".join(list(cell.levels.values())[1:])


def save_grid(study: Study) -> None:
    """Into the runs' directory, so that the report knows what should be there. Seeds of earlier commands stay.

    Raises: ValueError when the directory is another study's: cells of it are not in this grid, or are other changes.
    """
    file = study.file
    if (study.runs_dir / GRID_FILE).is_file():
        before = _read_grid(study.runs_dir)
        _refuse_another(before, study)
        file = file.model_copy(update={"seeds": sorted({*before.seeds, *file.seeds})})
    study.runs_dir.mkdir(parents=True, exist_ok=True)
    write_text(study.runs_dir / GRID_FILE, file.model_dump_json(indent=2) + "\n")


def _refuse_another(before: StudyFile, study: Study) -> None:
    cells = {cell.name: cell.overrides for cell in expand(study.file)}
    others = [cell.name for cell in expand(before) if cells.get(cell.name) != cell.overrides]
    if (before.name, before.base) == (study.file.name, study.file.base) and not others:
        return
    what = f"the cell {others[0]}" if others else f"the name {before.name} and the base {before.base}"
    raise ValueError(
        f"{study.runs_dir} was made by another study file than {study.path}: it has {what}; give another --runs "
        "directory. Cells may be added to a study, but not changed"
    )


def read_results(runs_dir: Path) -> Results:
    """All that lies in a study's directory. ValueError when nothing of a study is there, or no run has finished."""
    file = _read_grid(runs_dir)
    cells = expand(file)
    paths = {(cell.name, seed): runs_dir / cell.name / f"seed-{seed}" for cell in cells for seed in file.seeds}
    runs = [
        Result(cell, seed, paths[cell.name, seed], read_record(paths[cell.name, seed]))
        for seed in file.seeds
        for cell in cells
    ]
    if not any(run.has_ended for run in runs):
        raise ValueError(f"{runs_dir}: no run of the study has ended yet, so there is nothing to report")
    starts = [read_record(runs_dir / PREPARE / f"seed-{seed}") for seed in file.seeds]
    return Results(file, runs_dir, cells, tuple(runs), tuple(record for record in starts if record))


def _read_grid(runs_dir: Path) -> StudyFile:
    path = runs_dir / GRID_FILE
    if not path.is_file():
        raise ValueError(f"{runs_dir} holds no study: {GRID_FILE} is missing; give the directory that a study ran in")
    return checked_study(read_json_as(path, StudyFile), path)


# --- what can't be concluded ----------------------------------------------------------------------------------------


def reservations(results: Results) -> list[str]:
    """Why the numbers may mislead: what is missing, what doesn't belong together."""
    notes = []
    done = [run for run in results.runs if run.has_ended]
    if missing := [run for run in results.runs if not run.has_ended]:
        names = ", ".join(f"{run.cell.name} seed {run.seed} ({run.state})" for run in missing)
        notes.append(f"{len(missing)} of {len(results.runs)} runs are incomplete and are left out: {names}.")
    if diverged := [run for run in done if run.diverged]:
        names = ", ".join(f"{run.cell.name} seed {run.seed}" for run in diverged)
        notes.append(f"Ended by a gradient that is not finite, at their last evaluation: {names}.")
    records = [run.record for run in done if run.record] + list(results.starts)
    notes += _differing("code", {record.code for record in records})
    for package in sorted({name for record in records for name in record.versions}):
        notes += _differing(package, {record.versions.get(package, "none") for record in records})
    if len(results.file.seeds) == 1:
        notes.append(f"One seed only ({results.file.seeds[0]}): there is no spread, and no difference can be trusted.")
    if not results.is_accuracy:
        notes.append(
            "Held-out rewards are not all 0 or 1: their mean is no accuracy, and rules in points of accuracy (collapse, the "
            "paper's claims) are not applied."
        )
    elif sizes := _answer_counts(done):
        notes.append(
            f"Held-out accuracy rests on {sizes} answers: chance alone spreads it by {50 / math.sqrt(sizes):.1f} "
            f"points (one standard error at 50 %), beside the spread over seeds."
        )
    return notes


def _differing(what: str, found: set[str]) -> list[str]:
    if len(found) < 2:
        return []
    return [f"Runs of different versions are compared, {what}: {', '.join(sorted(found))}."]


def _answer_counts(done: Sequence[Result]) -> int | None:
    """Answers of one evaluation; None when runs differ in it or the held-out file is gone."""
    counts = set()
    for run in done:
        evaluation, heldout = run.config["eval"], run.config["data"]["heldout"]
        if heldout is None or not Path(heldout).is_file():
            return None
        num_prompts = sum(1 for line in read_text(heldout).splitlines() if line.strip())
        counts.add(min(num_prompts, evaluation["max_prompts"] or num_prompts) * evaluation["samples_per_prompt"])
    return counts.pop() if len(counts) == 1 else None
