"""What lies in the directory of a run of a study, and what is to be done about it.

Beside the files of `drpo-megatron train`: `cell.json`, the record of the attempts, and `output.txt`, their output. A
run is finished when its summary is there, and is never done again. What was made by another configuration or from
another start is never mixed with what comes now: it is named, and refused. Other code than that of today finishes no
run that it didn't begin, and the report says which code made which.
"""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

import drpo_megatron
from drpo_megatron.files import write_text
from drpo_megatron.orchestration.run_directory import RunDirectory, versions
from drpo_megatron.reading import read_json_as, read_yaml
from drpo_megatron.study.runs import Run

RECORD_FILE = "cell.json"
OUTPUT_FILE = "output.txt"
_NOT_NUMBERS = ("study", "planner", "conversion", "commands", "cli.py", "plots.py")
"""Parts of the package that no number of a run comes from."""
_SHOWN = 4
"""Differing keys that a refusal names."""
_NOTHING = "(nothing)"
SIGN_OF_LIFE_S = 30.0
"""How often the record of a running run is touched, for those who look from another machine."""
_SILENCE_S = 10 * SIGN_OF_LIFE_S
"""A run on another machine that wasn't touched for so long is taken for dead."""

State = Literal["done", "resume", "new", "changed", "alive"]


@dataclass
class Record:
    """cell.json."""

    cell: str
    seed: int
    levels: dict[str, str]
    overrides: list[str]
    code: str
    """Hash of the package's source."""
    start: str | None
    """Hash of what was asked of the run that made the model to start from."""
    versions: dict[str, str]
    state: Literal["running", "done", "diverged", "failed", "interrupted"] = "running"
    """diverged: a gradient that is not finite ended it, which is a result."""
    attempts: int = 0
    host: str = ""
    pid: int | None = None
    """Of the process that runs it now, with the time that it was created: numbers of processes are used again."""
    pid_created: float | None = None
    started: str = ""
    seconds: float = 0.0
    """Over all attempts."""
    error: list[str] = field(default_factory=list)
    """The last lines of the output of a failed attempt."""

    def save(self, path: Path) -> None:
        write_text(path / RECORD_FILE, json.dumps(asdict(self), indent=2) + "\n")


def new_record(run: Run) -> Record:
    return Record(
        cell=run.cell,
        seed=run.seed,
        levels=run.levels,
        overrides=list(run.overrides),
        code=code_version(),
        start=_start(run),
        versions=versions(),
        started=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def read_record(path: Path) -> Record | None:
    file = path / RECORD_FILE
    return read_json_as(file, Record) if file.is_file() else None


def state_of(run: Run) -> tuple[State, str]:
    """What the directory holds, and why a `changed` or `alive` one can't be gone on with."""
    directory, record = RunDirectory(run.path), read_record(run.path)
    if record is not None and _is_alive(record, run.path):
        return "alive", f"process {record.pid} of {record.host} is running it; wait for it, or end it there"
    finished = directory.summary_file.is_file() or (record is not None and record.state == "diverged")
    if not finished and not directory.has_checkpoint():
        return "new", ""
    if differences := list(_differences(run, directory, record)):
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        return "changed", "; ".join(differences[:_SHOWN]) + more
    if finished:
        return "done", ""
    try:
        RunDirectory.reopen(run.path, None, [])
    except ValueError:  # Of a version whose configuration this one refuses.
        return "new", ""
    return ("resume" if record and record.code == code_version() else "new"), ""


def _differences(run: Run, directory: RunDirectory, record: Record | None) -> Iterator[str]:
    if record is None:
        yield f"it holds a run that no study made ({RECORD_FILE} is missing)"
        return
    before = dict(_flat(read_yaml(directory.config_file)))
    now = dict(_flat(run.config.model_dump(mode="json")))
    for key, value in before.items():  # Keys that the code didn't have then had no effect.
        if value != now.get(key, _NOTHING) and key != "run.run_dir":
            yield f"{key}={now.get(key, _NOTHING)} (it has {value})"
    if record.start != _start(run):
        yield "the run that made its start has another configuration"


def _start(run: Run) -> str | None:
    if run.start is None:
        return None
    asked = [text for text in run.start.overrides if not text.startswith("run.run_dir=")]
    return hashlib.sha256("\n".join([str(run.start.base), *asked]).encode()).hexdigest()[:12]


def _is_alive(record: Record, path: Path) -> bool:
    if record.state != "running" or record.pid is None:
        return False
    if record.host != socket.gethostname():
        return time.time() - (path / RECORD_FILE).stat().st_mtime < _SILENCE_S
    try:
        process = psutil.Process(record.pid)
        return process.create_time() == record.pid_created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@cache
def code_version() -> str:
    """A hash of all source that a run's numbers come from: versions alone don't tell an edited tree."""
    root = Path(drpo_megatron.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in _NOT_NUMBERS:
            digest.update(f"{name.as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
