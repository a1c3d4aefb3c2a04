"""One line of the doctor's report."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    status: Status
    found: str
    """Comparable between nodes that are alike; what may differ stands in `detail`."""
    advice: str = ""
    """What to do. Empty when nothing has to be done."""
    detail: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def ok(name: str, found: str, detail: str = "") -> Finding:
    return Finding(name, "ok", found, detail=detail)


def warn(name: str, found: str, advice: str, detail: str = "") -> Finding:
    return Finding(name, "warn", found, advice, detail)


def fail(name: str, found: str, advice: str, detail: str = "") -> Finding:
    return Finding(name, "fail", found, advice, detail)


def examine(parts: Mapping[str, Callable[[], Iterable[Finding]]]) -> list[Finding]:
    """All findings. A part that raises becomes a failed line of its name: a doctor that crashes helps nobody."""
    findings: list[Finding] = []
    for name, part in parts.items():
        try:
            findings += part()
        except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
            findings.append(
                fail(name, f"{type(error).__name__}: {error}", "the check itself failed; mend what it names")
            )
    return findings
