"""What the check found so far: NAME.json, which it continues from, and NAME.md, for people. Written after every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drpo_megatron.doctor.accept.identity import differences
from drpo_megatron.doctor.accept.stage import Outcome, Settings, Stage
from drpo_megatron.files import write_text
from drpo_megatron.reading import read_json_object

FORMAT = 1
_SIGNS = {"pass": "pass", "fail": "**fail**", "skipped": "skipped"}


@dataclass
class Report:
    stem: Path
    """Of both files, without their endings."""
    identity: dict[str, Any]
    settings: Settings
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    note: str = ""
    """Why nothing of an earlier report was kept, if so."""

    @property
    def json_file(self) -> Path:
        return self.stem.with_name(self.stem.name + ".json")

    @property
    def markdown_file(self) -> Path:
        return self.stem.with_name(self.stem.name + ".md")

    @classmethod
    def open(cls, stem: Path, identity: dict[str, Any], settings: Settings) -> Report:
        """The report there, to be continued; a new one if there is none, or it is of another machine or other versions.

        Raises: ValueError for a file that isn't such a report.
        """
        report = cls(stem, identity, settings)
        if not report.json_file.is_file():
            return report
        try:
            fields = read_json_object(report.json_file)
            if fields["format"] != FORMAT:
                report.note = f"{report.json_file} is in format {fields['format']}, and this version writes {FORMAT}"
                return report
            changed = differences(fields["identity"], identity)
            old = Settings(**fields["settings"])
            outcomes = {name: Outcome.from_dict(outcome) for name, outcome in fields["stages"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{report.json_file} is not a report of this check ({type(error).__name__}: {error}); remove it, or give "
                "another name with --report"
            ) from error
        for name in ("device", "num_devices", "size", "sglang_python"):
            if getattr(old, name) != getattr(settings, name):
                changed.append(f"{name} was {getattr(old, name)} and is {getattr(settings, name)}")
        if changed:
            report.note = f"{report.json_file} is begun anew: {'; '.join(changed)}"
        else:
            report.outcomes = outcomes
        return report

    def add(self, stage: Stage, outcome: Outcome, stages: Sequence[Stage]) -> None:
        """And write both files."""
        self.outcomes[stage.name] = outcome
        fields = {
            "format": FORMAT,
            "identity": self.identity,
            "settings": asdict(self.settings),
            "stages": {s.name: self.outcomes[s.name].as_dict() for s in stages if s.name in self.outcomes},
        }
        write_text(self.json_file, json.dumps(fields, indent=2) + "\n")
        write_text(self.markdown_file, self.to_markdown(stages))

    def to_markdown(self, stages: Sequence[Stage]) -> str:
        devices = self.identity["devices"]
        kinds = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices)) or "no GPU"
        on = f"{self.settings.num_devices} " + ("GPU(s)" if self.settings.device == "gpu" else "CPU ranks")
        lines = [
            f"# Acceptance check of {self.identity['host']}",
            "",
            f"{kinds}; {self.identity['cpus']} CPU cores. Run on {on}, sizes: {self.settings.size}.",
            "",
            "| stage | result | seconds | proves | reason |",
            "|---|---|---|---|---|",
        ]
        for stage in stages:
            outcome = self.outcomes.get(stage.name)
            cells = (
                ("not run yet", "", stage.proves, "")
                if outcome is None
                else (_SIGNS[outcome.status], f"{outcome.seconds:.0f}", stage.proves, outcome.reason)
            )
            lines.append(_row(stage.name, *cells))
        lines += ["", "## Versions", "", "| | |", "|---|---|"]
        lines += [_row(name, version) for name, version in self.identity["versions"].items()]
        for stage in stages:
            if stage.name in self.outcomes:
                lines += _section(stage, self.outcomes[stage.name])
        return "\n".join(lines) + "\n"


def _section(stage: Stage, outcome: Outcome) -> list[str]:
    lines = ["", f"## {stage.name}", "", f"    {outcome.command}", ""]
    lines.append(
        f"{outcome.status.capitalize()} after {outcome.seconds:.0f} s, ended {outcome.ended}; log: {outcome.log}"
    )
    if outcome.reason:
        lines += ["", outcome.reason.replace("\n", "\n    ")]
    if outcome.checks:
        lines += ["", "| check | result | found |", "|---|---|---|"]
        lines += [_row(check.name, _SIGNS[check.status], check.found) for check in outcome.checks]
    if outcome.figures:
        lines += ["", "| figure | |", "|---|---|"]
        lines += [_row(name, _number(value)) for name, value in outcome.figures.items()]
    return lines


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
