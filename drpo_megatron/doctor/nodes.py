"""Reports of several nodes: what is not the same everywhere, and who is the odd one out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from drpo_megatron.doctor.finding import Finding
from drpo_megatron.reading import checked, parse_json
from drpo_megatron.slurm.environment import differences


@dataclass(frozen=True, slots=True)
class Report:
    node: str
    findings: tuple[Finding, ...]

    def to_json(self) -> str:
        """One line, so that the output of many nodes is JSONL."""
        return json.dumps({"node": self.node, "findings": [finding.as_dict() for finding in self.findings]})

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "fail"]


def read_reports(lines: Iterable[str]) -> list[Report]:
    """Of what nodes printed, other lines (srun's own) skipped. ValueError when less than two are there."""
    reports = []
    for line in lines:
        _, brace, rest = line.partition("{")  # srun --label puts the task's number before it.
        with suppress(ValueError):
            reports.append(checked(parse_json(brace + rest, "a line"), Report, "a line"))
    if len(reports) < 2:
        raise ValueError(
            f"{len(reports)} report(s) of nodes were given, and comparing takes 2; make them with: "
            "srun --ntasks-per-node=1 drpo-megatron doctor --json > reports.jsonl"
        )
    return reports


def odd_ones(reports: list[Report]) -> list[str]:
    """What differs, as `slurm.environment.differences` says it, and then what failed, by node."""
    names = [report.node for report in reports]
    labels = [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]
    found = {
        label: {finding.name: finding.found for finding in report.findings}
        for label, report in zip(labels, reports, strict=True)
    }
    failed = [
        f"{finding.name} fails on {label}: {finding.found}; {finding.advice}"
        for label, report in zip(labels, reports, strict=True)
        for finding in report.failed
    ]
    return [_explained(line) for line in differences(found)] + failed


def _explained(line: str) -> str:
    if line.startswith("run directory is"):
        return f"{line}: these nodes see different directories under one name; use a file system that all share"
    return line
