"""Runs the stages, one after the other, each as a process of its own, and keeps the report.

A stage that crashes, hangs or takes its ranks with it is a failed stage of the report and nothing more. What it started
is ended with it. An interrupt ends the present stage, which is then not in the report, and the check.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from drpo_megatron.doctor.accept.display import Display
from drpo_megatron.doctor.accept.processes import end, nothing_left_behind
from drpo_megatron.doctor.accept.report import Report
from drpo_megatron.doctor.accept.stage import Outcome, Stage, read_outcome

_POLL_S = 0.1
_LOG_LINES = 8


def run_stages(
    chosen: Sequence[Stage],
    report: Report,
    every: Sequence[Stage],
    display: Display,
    again: bool,
    patience: float = 1.0,
) -> list[Stage]:
    """Those that failed, now or in what is kept.

    Args:
        chosen: stages to run, but those that passed or failed already. One that was skipped is looked at again.
        every: all stages, for the report.
        again: run what is finished, too.
        patience: factor on every time limit.
    """
    for index, stage in enumerate(chosen):
        known = report.outcomes.get(stage.name)
        if known is not None and known.status != "skipped" and not again:
            display.kept(index, stage, known)
            continue
        display.started(index, stage)
        outcome = _run(stage, report, stage.timeout_s * patience, display)
        report.add(stage, outcome, every)
        display.ended(index, stage, outcome)
    return [stage for stage in chosen if report.outcomes[stage.name].status == "fail"]


def _run(stage: Stage, report: Report, timeout_s: float, display: Display) -> Outcome:
    scratch = Path(report.settings.scratch)
    logs = scratch / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log, results = logs / f"{stage.name}.log", scratch / f"{stage.name}.results.json"
    results.unlink(missing_ok=True)
    settings = replace(report.settings, scratch=str(scratch / stage.name))
    command = [sys.executable, "-m", "drpo_megatron.doctor.accept.worker", stage.module, str(results), str(os.getpid())]
    began, how = time.monotonic(), ""
    with nothing_left_behind(), log.open("wb") as output:
        # A session of its own: a Ctrl-C of the terminal comes to the check alone, which ends its stage in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # It died at once; its exit says more.
                process.stdin.write(settings.to_json().encode())
                process.stdin.close()
            while process.poll() is None:
                if time.monotonic() - began > timeout_s:
                    how = f"it hangs: not done after {timeout_s:.0f} s"
                    break
                display.tick(log)
                time.sleep(_POLL_S)
        finally:
            end(process, stage.grace_s)
    if not how and process.returncode:
        how = f"it ended with {_exit(process.returncode)} before it was done"
    if how:
        how = "\n".join([f"{how}; log: {log}", *(f"| {line}" for line in _last_lines(log))])
    return replace(
        read_outcome(results, how),
        seconds=time.monotonic() - began,
        command=command_of(stage, report),
        log=str(log),
        ended=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def command_of(stage: Stage, report: Report) -> str:
    settings = report.settings
    return (
        f"drpo-megatron doctor --accept --stages {stage.name} --again --device {settings.device} "
        f"--num-devices {settings.num_devices} --size {settings.size} --sglang-python {settings.sglang_python} "
        f"--report {report.stem}"
    )


def _exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _last_lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
