"""The runs of a study: every cell with every seed, as overrides of `drpo-megatron train`, all checked beforehand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drpo_megatron.config import Config, load_config
from drpo_megatron.config.base import Section
from drpo_megatron.config.checks import check_config
from drpo_megatron.config.problems import listed
from drpo_megatron.precision.checks import check_precision
from drpo_megatron.precision.recipes import find_hardware
from drpo_megatron.reading import read_json_object
from drpo_megatron.study.file import Cell, Overrides, Selector, StudyFile, expand, read_study_file, selector_problems
from drpo_megatron.study.file import selects as selects_levels

PREPARE = "_prepare"
"""The directory of the shared starts. No cell can have this name."""


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """One process to be: a cell with a seed, or the shared start of a seed."""

    cell: str
    seed: int
    levels: dict[str, str]
    path: Path
    base: Path
    overrides: tuple[str, ...]
    """KEY=VALUE, as `drpo-megatron train` takes them."""
    config: Config
    start: Run | None = None
    """The run whose exported model this one starts from."""

    @property
    def title(self) -> str:
        return f"{'the start' if self.cell == PREPARE else self.cell} of seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Study:
    file: StudyFile
    path: Path
    runs_dir: Path
    cells: tuple[Cell, ...]
    prepares: tuple[Run, ...]
    runs: tuple[Run, ...]
    """Seed by seed, so that a study that is stopped early has whole seeds."""
    warnings: tuple[str, ...]


def load_study(
    path: Path, runs_dir: Path | None = None, seeds: Sequence[int] | None = None, only: Selector | None = None
) -> Study:
    """The expanded and checked study.

    Args:
        runs_dir: where the runs go; None: `runs/<name>`.
        seeds: instead of the file's.
        only: the cells to run; None: all.
    Raises: ValueError that lists every problem of the file, or of the cells' configurations.
    """
    file = read_study_file(path)
    if seeds is not None:
        file = file.model_copy(update={"seeds": list(seeds)})
    runs_dir = runs_dir or Path("runs") / file.name
    cells = _chosen(expand(file), only or {}, file)
    maker = _RunMaker(file, runs_dir)
    prepares = [maker.prepare(seed) for seed in file.seeds] if file.prepare is not None else []
    starts: dict[int, Run | None] = {run.seed: run for run in prepares if run}
    runs = [maker.run(cell, seed, starts.get(seed)) for seed in file.seeds for cell in cells]
    if maker.problems:
        texts = [f"{text} (in {_some(names)})" for text, names in maker.problems.items()]
        raise ValueError(listed(f"{path}: cells that can't run", texts))
    made = [tuple(run for run in some if run) for some in (prepares, runs)]
    return Study(file, path, runs_dir, cells, made[0], made[1], tuple(maker.warnings))


def _chosen(cells: tuple[Cell, ...], only: Selector, file: StudyFile) -> tuple[Cell, ...]:
    if problems := list(selector_problems("--only", only, file.axes)):
        raise ValueError("\n".join(problems))
    chosen = tuple(cell for cell in cells if selects_levels(only, cell.levels))
    if not chosen:
        wanted = " ".join(f"{axis}={','.join(levels)}" for axis, levels in only.items())
        raise ValueError(f"--only {wanted}: the grid has no such cell; exclude of the study file leaves it out")
    return chosen


class _RunMaker:
    """Makes runs and collects what is wrong with them, each problem once, with the cells that have it."""

    def __init__(self, file: StudyFile, runs_dir: Path) -> None:
        self.file, self.runs_dir, self.base = file, runs_dir, Path(file.base)
        self.problems: dict[str, list[str]] = {}
        self.warnings: dict[str, None] = {}
        self.configs: dict[str, Config | None] = {}
        """By cell; None: it can't run."""
        self.twins: dict[str, str] = {}
        """A configuration without what the study sets itself -> the first cell that has it."""

    def prepare(self, seed: int) -> Run | None:
        overrides = self.file.overrides | (self.file.prepare or {}) | {"checkpoint.save_hf": True}
        return self._make(PREPARE, {}, seed, overrides, None)

    def run(self, cell: Cell, seed: int, start: Run | None) -> Run | None:
        run = self._make(cell.name, cell.levels, seed, self.file.overrides | cell.overrides, start)
        if run is not None:
            fields = run.config.model_dump(mode="json", exclude={"run": {"name", "seed", "run_dir"}})
            if start is not None:
                del fields["model"]["hf_path"]
            twin = self.twins.setdefault(json.dumps(fields, sort_keys=True), cell.name)
            if twin != cell.name:
                self._add(f"the configuration is that of {twin}", cell.name)
        return run

    def _make(
        self, cell: str, levels: dict[str, str], seed: int, overrides: Overrides, start: Run | None
    ) -> Run | None:
        console = {"metrics.console": "plain"}  # Its output goes to a file.
        overrides = console | overrides | {"run.name": cell} | ({"warmup": None} if start is not None else {})
        if (config := self._config(cell, overrides)) is None:
            return None
        path = self.runs_dir / cell / f"seed-{seed}"
        own: Overrides = {"run.seed": seed, "run.run_dir": str(path)}
        updates: dict[str, Section] = {"run": config.run.model_copy(update={"seed": seed, "run_dir": str(path)})}
        if start is not None:
            own["model.hf_path"] = str(start.path / "hf")
            updates["model"] = config.model.model_copy(update={"hf_path": own["model.hf_path"]})
        texts = tuple(_texts(overrides | own))
        return Run(cell, seed, levels, path, self.base, texts, config.model_copy(update=updates), start)

    def _config(self, cell: str, overrides: Overrides) -> Config | None:
        """The same for all seeds. The start has not been made yet, but shape and tokenizer are the base model's."""
        if cell not in self.configs:
            self.configs[cell] = None
            try:
                config = load_config(self.base, _texts(overrides))
                self.warnings |= dict.fromkeys([*check_config(config), *_precision_notes(config)])
                self.configs[cell] = config
            except ValueError as error:
                title, *lines = str(error).splitlines()
                for text in [line.strip().removeprefix("- ") for line in lines] or [title]:
                    self._add(text, cell)
        return self.configs[cell]

    def _add(self, problem: str, cell: str) -> None:
        names = self.problems.setdefault(problem, [])
        if cell not in names:
            names.append(cell)


def _precision_notes(config: Config) -> list[str]:
    hf_config = read_json_object(Path(config.model.hf_path) / "config.json")
    hardware = find_hardware(config.trainer.backend) if config.cluster.ray_address is None else None
    return check_precision(config, hf_config, hardware)


def _texts(overrides: Overrides) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
