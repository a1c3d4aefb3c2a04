"""The doctor's own findings."""

from __future__ import annotations

from pathlib import Path

from drpo_megatron.doctor.accept.stage import Results, Settings
from drpo_megatron.doctor.everything import examine_everything


def run(settings: Settings, results: Results) -> None:
    for finding in examine_everything(Path(settings.run_dir), Path(settings.sglang_python)):
        text = " ".join(filter(None, [finding.found, f"({finding.detail})" if finding.detail else ""]))
        if finding.status == "fail":
            results.failed(finding.name, f"{text}: {finding.advice}")
        else:
            results.passed(finding.name, f"{text} (warning: {finding.advice})" if finding.status == "warn" else text)
