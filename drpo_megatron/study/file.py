"""A study file, and the grid of cells that it stands for.

    name: fp8_objectives
    base: examples/quickstart.yaml       the run that every cell is a change of
    overrides: {run.num_steps: 40}       for all of them
    prepare: {run.num_steps: 0}          optional: one such run a seed, whose hf/ all cells of the seed start from
    seeds: [0]
    axes:                                the grid is their product; a level is a name and its overrides
      objective: {grpo: {objective: grpo}, drpo: {objective: {name: drpo, delta: 0.15}}}
      anchor: {rollout: {}, recompute: {objective.anchor: recompute}}
    exclude: [{objective: grpo, anchor: recompute}]

Overrides are those of the command line, dotted keys to values, and are applied in the order base, overrides, axes. A
cell is named by its levels, `grpo+rollout`, and its run with seed 1 lives in `RUNS/grpo+rollout/seed-1`.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from drpo_megatron.config.base import DirectoryName, Line, Section, Seed
from drpo_megatron.config.load import parse_yaml
from drpo_megatron.config.problems import listed
from drpo_megatron.reading import read_text

Overrides = dict[str, Any]
Selector = dict[str, list[str]]
"""Some cells: for each axis named, the levels that belong."""

OWN_KEYS = ("run.name", "run.seed", "run.run_dir", "run.output_dir")
"""What the study sets itself in every run."""
START_KEYS = ("model.hf_path", "warmup")
"""What it sets in cells that share a start."""
_LEVEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Claims(Section):
    """Which cells the paper's claims speak of."""

    full: Selector
    """Full precision."""
    fp8: Selector
    """FP8 in the rollouts, or in rollouts and training."""
    ratio: Selector
    """Methods with a trust region of the ratio: GRPO, SPO."""
    dppo: Selector
    drpo: Selector


class StudyFile(Section):
    """What stands in the file. `exclude` takes a level or a list of levels for each axis."""

    name: DirectoryName
    base: Line
    overrides: Overrides = {}
    prepare: Overrides | None = None
    seeds: list[Seed]
    axes: dict[str, dict[str, Overrides | None]]
    exclude: list[dict[str, str | list[str]]] = []
    claims: Claims | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Cell:
    name: str
    levels: dict[str, str]
    """Axis -> level."""
    overrides: Overrides


def read_study_file(path: Path) -> StudyFile:
    """Raises: ValueError that lists every problem of the file itself; those of its cells' runs come later."""
    try:
        file = StudyFile.model_validate(parse_yaml(read_text(path), str(path)))
    except ValidationError as error:
        problems = [_problem_text(detail["loc"], detail["type"], detail["msg"]) for detail in error.errors()]
        raise ValueError(listed(f"{path} is not a valid study", problems)) from None
    return checked_study(file, path)


def checked_study(file: StudyFile, path: Path) -> StudyFile:
    """The same. ValueError lists what no single key shows: names, repetitions, an empty grid."""
    if problems := list(_problems(file)):
        raise ValueError(listed(f"{path} is not a valid study", problems))
    if not expand(file):
        raise ValueError(f"{path}: the grid is empty: exclude leaves out every cell; remove a rule of it")
    return file


def expand(file: StudyFile) -> tuple[Cell, ...]:
    """The cells of the grid, the first axis outermost."""
    cells = []
    for chosen in itertools.product(*(levels.items() for levels in file.axes.values())):
        levels = dict(zip(file.axes, (name for name, _ in chosen), strict=True))
        if any(selects(_as_selector(rule), levels) for rule in file.exclude):
            continue
        overrides = {key: value for _, level in chosen for key, value in (level or {}).items()}
        cells.append(Cell("+".join(levels.values()), levels, overrides))
    return tuple(cells)


def selects(selector: Mapping[str, Sequence[str]], levels: Mapping[str, str]) -> bool:
    return all(levels[axis] in wanted for axis, wanted in selector.items())


def selector_problems(where: str, selector: Selector, axes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Axes and levels that the grid doesn't have."""
    for axis, levels in selector.items():
        if axis not in axes:
            yield f"{where}: there is no axis {axis}{did_you_mean(axis, axes)}"
            continue
        for level in levels:
            if level not in axes[axis]:
                yield f"{where}: axis {axis} has no level {level}{did_you_mean(level, axes[axis])}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known := list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _as_selector(rule: Mapping[str, str | list[str]]) -> Selector:
    return {axis: [levels] if isinstance(levels, str) else levels for axis, levels in rule.items()}


# --- what can be wrong ----------------------------------------------------------------------------------------------


def _problem_text(location: Sequence[str | int], kind: str, message: str) -> str:
    key = ".".join(map(str, location)) or "the file"
    if kind == "extra_forbidden":
        known = Claims.model_fields if location[0] == "claims" else StudyFile.model_fields
        return f"{key} is unknown{did_you_mean(str(location[-1]), known)}"
    return f"{key}: {message}"


def _problems(file: StudyFile) -> Iterator[str]:
    if not file.axes:
        yield "axes: the grid is empty; name at least one axis with its levels"
    for axis, levels in file.axes.items():
        if not levels:
            yield f"axes.{axis}: has no levels, so the grid is empty; name at least one"
        for name in levels:
            if not _LEVEL.fullmatch(name):
                yield f"axes.{axis}.{name}: use letters, digits, '.', '_' and '-' in names: directories are named so"
    if not file.seeds:
        yield "seeds: give at least one"
    for seed in sorted({seed for seed in file.seeds if file.seeds.count(seed) > 1}):
        yield f"seeds: {seed} stands there {file.seeds.count(seed)} times"
    for rule in file.exclude:
        yield from selector_problems("exclude", _as_selector(rule), file.axes)
    if file.claims is not None:
        for name in Claims.model_fields:
            yield from selector_problems(f"claims.{name}", getattr(file.claims, name), file.axes)
    yield from _override_problems(file)


def _override_problems(file: StudyFile) -> Iterator[str]:
    """Keys that the study sets itself, and keys that one axis would take back from another."""
    axes = {
        f"axes.{axis}": sorted({key for level in levels.values() for key in level or {}})
        for axis, levels in file.axes.items()
    }
    reserved = (*OWN_KEYS, *START_KEYS) if file.prepare is not None else OWN_KEYS
    places = {"overrides": list(file.overrides), "prepare": list(file.prepare or {})} | axes
    for where, keys in places.items():
        for key in keys:
            if key in (reserved if where in axes else OWN_KEYS):
                yield f"{where}: {key} is set by the study itself; leave it out"
    for (first, keys), (second, later) in itertools.combinations(axes.items(), 2):
        for one, other in itertools.product(keys, later):
            if one == other or one.startswith(f"{other}."):
                yield f"{second} sets {other} and so undoes {one} of {first}; use different keys, or the other order"
