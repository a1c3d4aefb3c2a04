"""Where a run keeps its files, and how a checkpoint comes to be whole or not at all.

    RUN_DIR/config.yaml                      the resolved configuration
            metrics.jsonl, training.png, summary.json
            logs/<process>.log               output of every process
            checkpoints/step_000040/         trainer files, rollouts.json and driver.json
            rollouts/step_000040.jsonl       what each step trained on, with rollout.dump
            reference/                       the policy after the warm-up, when objective.kl_ref refers to it
            hf/                              the trained model as a Hugging Face checkpoint

A checkpoint is written under a temporary name and renamed when all of it is on the disk, so a directory named
`step_*` is complete; a killed run leaves at most a `.writing-*` directory, which the next save removes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drpo_megatron.config import Config, load_config, load_resolved, save_config
from drpo_megatron.rollout.dump import identity, rollout_file, write_rollout
from drpo_megatron.types import RolloutGroup

CHANGEABLE = ("run.num_steps", "metrics", "eval", "checkpoint", "cluster", "parallel", "rollout.engine.num_engines")
"""What may change at a resume: everything else would make it another run. In another layout, or with another number of
engines, a run continues to rounding and not bit by bit."""

_DRIVER_FILE = "driver.json"
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True)
class Progress:
    """What the driver has to remember. The trainer's own state lies beside it in the checkpoint."""

    step: int
    """RL steps done. 0: the warm-up, if any, is done."""
    policy_version: int
    accuracy: dict[str, float]
    """Held-out accuracy by step (a string, as JSON has it), where it was measured."""
    phase_s: dict[str, float]
    """Seconds spent in each activity so far, over all resumes."""
    num_trained_tokens: int
    wall_s: float
    early_warning: dict[str, Any] = field(default_factory=dict)
    """State of `EarlyWarning`."""


class RunDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.logs = path / "logs"
        self.checkpoints = path / "checkpoints"
        self.reference = path / "reference"
        self.hf = path / "hf"
        self.rollouts = path / "rollouts"
        self.summary_file = path / "summary.json"

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """A new directory with the resolved configuration. ValueError when there is a run in it."""
        run = cls(planned_path(config))
        run.logs.mkdir(parents=True, exist_ok=True)
        save_config(config, run.config_file)
        return run

    @classmethod
    def reopen(cls, path: Path, file: Path | None, overrides: Sequence[str]) -> tuple[RunDirectory, Config]:
        """The directory of a run to continue, and its configuration: of `file`, or the saved one, with overrides.

        Raises ValueError when there is no run, when it is complete, or when a key differs that makes it another run.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise ValueError(f"{path} holds no run to resume: {run.config_file.name} is missing")
        saved = load_resolved(run.config_file)
        config = load_config(file or run.config_file, overrides)
        if refused := _refused_changes(saved, config):
            raise ValueError(
                f"{path} can't be resumed with {'; '.join(refused)}: only {', '.join(CHANGEABLE)} may change. "
                f"Start a new run for anything else"
            )
        checkpoint = run.latest_checkpoint(config)
        if checkpoint is not None and checkpoint[1].step >= config.run.num_steps:
            raise ValueError(
                f"{path} is complete: {checkpoint[1].step} of run.num_steps={config.run.num_steps} steps are done; "
                f"continue it with a larger run.num_steps"
            )
        return run, config

    @classmethod
    def from_arguments(
        cls, arguments: Sequence[str], resume: Path | None, example: str
    ) -> tuple[RunDirectory | None, Config]:
        """The configuration that a command line asks for, not checked yet; with `resume` the run's directory, too.

        Args:
            arguments: FILE KEY=VALUE ...; without FILE where a run is resumed.
            example: a file to name when none was given.
        """
        file = arguments[0] if arguments and "=" not in arguments[0] else None
        overrides = arguments[1:] if file else arguments
        if resume is not None:
            return cls.reopen(resume, Path(file) if file else None, overrides)
        if file is None:
            raise ValueError(f"which run? give a YAML file, such as {example}, or --resume RUN_DIR")
        return None, load_config(file, overrides)

    def save_config(self, config: Config) -> None:
        save_config(config, self.config_file)

    def dump(self, step: int, groups: Sequence[RolloutGroup], config: Config) -> None:
        """Keep what `step` trains on, for `train --from-dump`."""
        self.rollouts.mkdir(exist_ok=True)
        write_rollout(rollout_file(self.rollouts, step), step, groups, identity(config))

    def has_checkpoint(self) -> bool:
        return bool(self._complete())

    def latest_checkpoint(self, config: Config) -> tuple[Path, Progress] | None:
        """The newest complete checkpoint; None when there is none. ValueError when it belongs to another config."""
        for path in reversed(self._complete()):
            record = json.loads((path / _DRIVER_FILE).read_text(encoding="utf-8"))
            if record["fingerprint"] != fingerprint(config):
                raise ValueError(f"{path} was saved with another configuration than {self.config_file}; restore it")
            return path, Progress(**record["progress"])
        return None

    @contextmanager
    def writing_checkpoint(self, progress: Progress, config: Config) -> Iterator[Path]:
        """A directory to fill. It becomes `step_<n>` when the block ends without error; then old ones are removed."""
        self.checkpoints.mkdir(exist_ok=True)
        for leftover in self.checkpoints.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)
        final = self.checkpoints / f"step_{progress.step:06d}"
        temporary = self.checkpoints / f"{_TEMPORARY}{final.name}"
        temporary.mkdir()
        yield temporary
        record = {"progress": asdict(progress), "fingerprint": fingerprint(config), "versions": versions()}
        (temporary / _DRIVER_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        for old in self._complete()[: -config.checkpoint.keep]:
            shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        """Oldest first."""
        found = [path for path in self.checkpoints.glob("step_*") if (path / _DRIVER_FILE).is_file()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def planned_path(config: Config) -> Path:
    """`run.run_dir`, or `<output_dir>/<name>-<stamp>`. ValueError when there is a run in it."""
    stamped = f"{config.run.output_dir}/{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunDirectory(Path(config.run.run_dir or stamped))
    if run.config_file.exists() or run.checkpoints.exists():
        raise ValueError(
            f"{run.path} holds another run; give another run.run_dir, or continue it: "
            f"drpo-megatron train --resume {run.path}"
        )
    return run.path


def versions() -> dict[str, str]:
    """Of the packages that decide a run's numbers."""
    packages = ("drpo-megatron", "torch", "megatron-core", "transformers", "ray")
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def fingerprint(config: Config) -> str:
    """Equal for configurations that are the same run: a hash of everything but what may change at a resume."""
    fixed = {key: value for key, value in _flat(config.model_dump(mode="json")) if not _is_changeable(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _refused_changes(saved: Config, config: Config) -> list[str]:
    before, after = (dict(_flat(c.model_dump(mode="json"))) for c in (saved, config))
    keys = [key for key in before | after if not _is_changeable(key) and before.get(key) != after.get(key)]
    return [f"{key}={after.get(key)} (the run has {before.get(key)})" for key in keys]


def _is_changeable(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "run.run_dir":  # It says where the run was made, not what it computes.
            yield f"{prefix}{name}", value
