"""What a stage is, what it is told and what it says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from drpo_megatron.files import write_text

Status = Literal["pass", "fail", "skipped"]


class Skip(Exception):
    """The stage, or the rest of it, makes no sense here; the message says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every stage is told."""

    device: Literal["cpu", "gpu"]
    """As `trainer.backend`."""
    num_devices: int
    """GPUs to use; on a CPU, ranks."""
    size: Literal["tiny", "full"]
    """tiny: seconds on one core. full: sizes that occupy a GPU."""
    scratch: str
    """Directory for what the stage makes."""
    sglang_python: str
    """Interpreter with SGLang."""
    run_dir: str
    """Where runs of the user go."""

    @property
    def is_tiny(self) -> bool:
        return self.size == "tiny"

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device == "gpu" else "cpu"

    @property
    def backend(self) -> str:
        """Of process groups."""
        return "nccl" if self.device == "gpu" else "gloo"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class Stage:
    name: str
    proves: str
    module: str
    """Has `run(settings, results)`; imported in a process of its own."""
    timeout_s: float
    """After which it counts as hanging."""
    grace_s: float = 20.0
    """How long it may then take to end its own processes."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a stage looked at."""

    name: str
    status: Status
    found: str
    """Numbers and their limits; of a skipped one the reason."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a stage that ran, to its end or not."""

    status: Status
    reason: str
    """Why it failed or was skipped; "" if it passed."""
    seconds: float = 0.0
    command: str = ""
    """Runs this stage again, alone."""
    log: str = ""
    ended: str = ""
    """Local time, ISO."""
    checks: tuple[Check, ...] = ()
    figures: dict[str, float | str] = field(default_factory=dict)
    """Measured numbers, their units in their names, and commands that were run."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Outcome:
        return cls(**{**fields, "checks": tuple(Check(**check) for check in fields["checks"])})


class Results:
    """Takes what a stage finds, prints it (into the stage's log), and has it on the disk at once: a crash loses nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.checks: list[Check] = []
        self.figures: dict[str, float | str] = {}

    def passed(self, name: str, found: str = "") -> None:
        self._add(Check(name, "pass", found))

    def failed(self, name: str, found: str) -> None:
        self._add(Check(name, "fail", found))

    def skipped(self, name: str, reason: str) -> None:
        self._add(Check(name, "skipped", reason))

    def at_most(self, name: str, found: float, limit: float) -> None:
        """Passes when `found` is a number within the limit."""
        text = f"{found:.3g} (limit {limit:.3g})"
        if found <= limit:  # Not so for a NaN.
            self.passed(name, text)
        else:
            self.failed(name, text)

    def figure(self, name: str, value: float | str) -> None:
        print(f"figure {name}: {value}", flush=True)
        self.figures[name] = value
        self._write(complete=False)

    def finish(self, skip_reason: str = "") -> None:
        """The stage came to its end. `skip_reason`: of a Skip, for what it had not looked at."""
        if skip_reason:
            print(f"skipped: {skip_reason}", flush=True)
        self._write(complete=True, skip_reason=skip_reason)

    def _add(self, check: Check) -> None:
        print(f"{check.status}: {check.name}: {check.found}", flush=True)
        self.checks.append(check)
        self._write(complete=False)

    def _write(self, complete: bool, skip_reason: str = "") -> None:
        fields = {
            "complete": complete,
            "skip_reason": skip_reason,
            "checks": [asdict(check) for check in self.checks],
            "figures": self.figures,
        }
        write_text(self.file, json.dumps(fields))


def read_outcome(file: Path, interruption: str) -> Outcome:
    """What the stage wrote to `file`. `interruption`: how its process ended, if not well: then it has failed."""
    fields: dict[str, Any] = {"complete": False, "skip_reason": "", "checks": [], "figures": {}}
    if file.is_file():
        fields = json.loads(file.read_text(encoding="utf-8"))
    checks = tuple(Check(**check) for check in fields["checks"])
    outcome = Outcome("pass", "", checks=checks, figures=fields["figures"])
    failures = [f"{check.name}: {check.found}" for check in checks if check.status == "fail"]
    if interruption or not fields["complete"]:
        return replace(outcome, status="fail", reason=interruption or "it ended before it was done")
    if failures:
        further = f" (and {len(failures) - 1} more)" if failures[1:] else ""
        return replace(outcome, status="fail", reason=failures[0] + further)
    if any(check.status == "pass" for check in checks):
        return outcome
    reason = fields["skip_reason"] or "; ".join(f"{check.name}: {check.found}" for check in checks)
    if reason:
        return replace(outcome, status="skipped", reason=reason)
    return replace(outcome, status="fail", reason="it looked at nothing")
