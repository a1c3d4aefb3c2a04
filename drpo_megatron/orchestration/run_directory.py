"""Where a run keeps its files, and how a checkpoint comes to be whole or not at all.

    RUN_DIR/config.yaml                      the resolved configuration
            metrics.jsonl, training.png, summary.json
            logs/<process>.log               output of every process
            lock.json                        which process has the directory (`run_lock.py`)
            checkpoints/step_000040/         trainer files, rollouts.json and driver.json
            rollouts/step_000040.jsonl       what each step trained on, with rollout.dump
            reference/                       the policy after the warm-up, when objective.kl_ref refers to it
            hf/                              the trained model as a Hugging Face checkpoint

A checkpoint is written under a hidden name and renamed when all of it is on the disk (`drpo_megatron.files`).
driver.json has its own checksum and those of the others; trainer/checksums.json those of the ranks' files.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drpo_megatron.checkpoint.checksums import (
    FileSum,
    missing_or_cut,
    read_checksums,
    sealed,
    sum_of,
    sums_of,
    unsealed,
)
from drpo_megatron.config import Config, load_config, load_resolved, save_config
from drpo_megatron.files import (
    explained,
    flush_tree,
    put_in_place,
    remove_directory,
    remove_remains,
    scratch_name,
    write_text,
)
from drpo_megatron.orchestration.changeable import refused, settings
from drpo_megatron.orchestration.run_lock import RunLock
from drpo_megatron.reading import read_json_object
from drpo_megatron.rollout.dump import identity, rollout_file, write_rollout
from drpo_megatron.types import RolloutGroup

TRAINER_FILES, ROLLOUTS_FILE = "trainer", "rollouts.json"
"""Of a checkpoint directory: the trainer's part, and what was drawn ahead with the place in the prompt stream."""
_DRIVER_FILE = "driver.json"
_TRAINER_SUMS = f"{TRAINER_FILES}/checksums.json"


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
    warmup: dict[str, Any] | None = None
    """Of a warm-up that was broken off: a `WarmupProgress`. None: it is done, or there is none."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    progress: Progress

    def __str__(self) -> str:
        """`step 40`, for `continuing ... after`."""
        warmup = self.progress.warmup
        return f"step {warmup['num_steps']} of the warm-up" if warmup else f"step {self.progress.step}"

    @property
    def trainer(self) -> Path:
        return self.path / TRAINER_FILES

    def rollouts(self) -> dict[str, Any]:
        return unsealed(self.path / ROLLOUTS_FILE)


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
        self.falls_back = False
        """A damaged newest checkpoint is set aside, and the one before it taken."""
        self._lock: RunLock | None = None

    @classmethod
    def create(cls, config: Config) -> RunDirectory:
        """A new directory with the resolved configuration. ValueError when there is a run in it."""
        run = cls(planned_path(config))
        with explained(run.path):
            run.logs.mkdir(parents=True, exist_ok=True)
        with run.locked():
            planned_path(config.model_copy(update={"run": config.run.model_copy(update={"run_dir": str(run.path)})}))
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
        if changes := refused(settings(saved), config):
            raise ValueError(
                f"{path} can't be resumed with {'; '.join(changes)}: only what can't change what is learnt may change "
                f"(docs/running.md lists it). Start a new run for anything else"
            )
        if run.is_complete(config):
            raise ValueError(
                f"{path} is complete: all of run.num_steps={config.run.num_steps} steps are done; "
                f"continue it with a larger run.num_steps"
            )
        return run, config

    @contextmanager
    def locked(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """No other process has the directory during the block. ValueError that names the one that has it now."""
        lock = RunLock.take(self.path, say)
        self._lock = lock
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def is_complete(self, config: Config) -> bool:
        """All steps are done, the last is saved, and what is made at the end (hf/, summary.json) is there."""
        checkpoints = self._checkpoints()
        if not checkpoints or _step(checkpoints[-1]) < config.run.num_steps or not self.summary_file.is_file():
            return False
        try:
            done = read_json_object(self.summary_file)["num_steps"] >= config.run.num_steps
        except (ValueError, KeyError, TypeError):
            return False
        return done and (not config.checkpoint.save_hf or (self.hf / "config.json").is_file())

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
        return bool(self._checkpoints())

    def latest_checkpoint(self, config: Config, say: Callable[[str], None] = print) -> Checkpoint | None:
        """The newest checkpoint; None when there is none.

        Names, sizes and the small files are looked at, with what makes the run the same. The ranks compare the contents
        of their own files (`Trainer.verify_checkpoint`); what they find comes back to `set_aside`.

        Raises: ValueError that names what is missing or damaged, unless `falls_back`: then that is said, and the one
            before is taken; and when it belongs to another configuration, with every key.
        """
        while checkpoints := self._checkpoints():
            path = checkpoints[-1]
            try:
                record = _record(path)
                progress = Progress(**record["progress"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = str(error) if type(error) is ValueError else f"{path / _DRIVER_FILE} is damaged: {error!r}"
                self.set_aside(path, [what], say)
                continue
            if changes := refused(record.get("settings") or settings(config), config):
                raise ValueError(
                    f"{path} was saved with another configuration than {self.config_file}: {'; '.join(changes)}; restore it"
                )
            return Checkpoint(path, progress)
        return None

    def set_aside(self, path: Path, problems: Sequence[str], say: Callable[[str], None]) -> None:
        """Of a damaged checkpoint: rename it, so that the one before is the newest.

        Raises: ValueError with the problems, when that was not asked for, or there is none before it.
        """
        what = f"checkpoint {path} can't be used: {'; '.join(problems[:3])}" + (
            f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        )
        before = [other for other in self._checkpoints() if _step(other) < _step(path)]
        if not before:
            raise ValueError(f"{what}. It is the only one: restore it, or start a new run")
        if not self.falls_back:
            raise ValueError(
                f"{what}. Restore it, or continue from {before[-1].name} with checkpoint.fallback=true (a requeued Slurm "
                "job does so by itself)"
            )
        path.rename(self.checkpoints / f"damaged-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        say(f"warning: {what}. Continuing from {before[-1].name}; the damaged one is kept as damaged-{path.name}-*")

    @contextmanager
    def writing_checkpoint(self, progress: Progress, config: Config) -> Iterator[Path]:
        """A directory to fill. It becomes `step_<n>` when the block ends without error; then old ones are removed.

        Raises: CannotWrite, which names it, when the disk is full; ValueError when another process has the directory.
        """
        if self._lock is not None:
            self._lock.check()
        final = self.checkpoints / f"step_{progress.step:06d}"
        with explained(final):
            self.checkpoints.mkdir(exist_ok=True)
            self._remove_remains()
            temporary = scratch_name(final)
            temporary.mkdir()
            try:
                yield temporary
                self._write_record(temporary, progress, config)
                flush_tree(temporary)
                if self._lock is not None:
                    self._lock.check()
                put_in_place(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # Half of one keeps a full disk full.
            for old in self._checkpoints()[: -config.checkpoint.keep]:
                remove_directory(old)

    def update_progress(self, progress: Progress, config: Config) -> None:
        """Of the checkpoint of its step, if there is one: what was measured after it was saved."""
        path = self.checkpoints / f"step_{progress.step:06d}"
        if path.is_dir():
            self._write_record(path, progress, config)

    def _write_record(self, path: Path, progress: Progress, config: Config) -> None:
        names = [name for name in (ROLLOUTS_FILE, _TRAINER_SUMS) if (path / name).is_file()]
        record = {
            "progress": asdict(progress),
            "settings": settings(config),
            "versions": versions(),
            "files": {name: asdict(found) for name, found in sums_of(path, names).items()},
        }
        write_text(path / _DRIVER_FILE, sealed(record))

    def _remove_remains(self) -> None:
        """What broken-off saves and removals left."""
        for name in {path.name[1:].partition(".writing-")[0] for path in self.checkpoints.glob(".*.writing-*")}:
            remove_remains(self.checkpoints / name)

    def _checkpoints(self) -> list[Path]:
        """Oldest first. All of them were whole when they got their names."""
        found = [path for path in self.checkpoints.glob("step_*") if path.name.removeprefix("step_").isdigit()]
        return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _record(path: Path) -> dict[str, Any]:
    """driver.json, when what it says of the other files holds. ValueError that names what is missing or damaged."""
    record = unsealed(path / _DRIVER_FILE)
    for name, entry in record.get("files", {}).items():
        expected = FileSum(**entry)
        problems = missing_or_cut(path, {name: expected})
        if not problems and sum_of(path / name) != expected:
            problems = [f"{path / name} is damaged: its checksum is another than when it was saved"]
        if problems:
            raise ValueError(problems[0])
    if (sums := read_checksums(path / TRAINER_FILES)) and (problems := missing_or_cut(path / TRAINER_FILES, sums)):
        raise ValueError("; ".join(problems[:3]) + (f", and {len(problems) - 3} more" if len(problems) > 3 else ""))
    return record


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
