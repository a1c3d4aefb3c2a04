"""Runs of a study as processes of `drpo-megatron train`, some at a time, each with its record and its output file.

    inspect(study)   every run's state; ValueError names those that can't be gone on with
    run_study(...)   the shared starts, then the cells; what is done is never done again

A failed run leaves its record and doesn't stop the others. However the study ends, no process of it stays behind.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import psutil

from drpo_megatron.config.problems import listed
from drpo_megatron.orchestration.run_directory import RunDirectory
from drpo_megatron.study.cells import (
    OUTPUT_FILE,
    RECORD_FILE,
    SIGN_OF_LIFE_S,
    Record,
    State,
    new_record,
    read_record,
    state_of,
)
from drpo_megatron.study.runs import PREPARE, Run, Study

_POLL_S = 0.2
_GRACE_S = 60.0
"""How long a run may take to end its processes after SIGTERM."""
_ERROR_LINES = 15
_DIVERGED = re.compile(r"gradient norm \S+ is not finite")
"""What a trainer rank says when it ends so."""


class Display(Protocol):
    def started(self, run: Run, state: State) -> None: ...

    def ended(self, run: Run, record: Record) -> None: ...

    def tick(self, running: Sequence[Run]) -> None: ...


def inspect(study: Study) -> dict[Run, State]:
    """The state of every run, shared starts included.

    Raises: ValueError that names every run that another process is at, or that another configuration made.
    """
    states: dict[Run, State] = {}
    problems = []
    for run in (*study.prepares, *study.runs):
        states[run], reason = state_of(run)
        if reason:
            problems.append(f"{run.path}: {reason}")
    if problems:
        raise ValueError(
            listed(f"{study.path} can't go on in its directory", problems)
            + "\nGive another --runs directory, restore what was changed, or remove these directories"
        )
    return states


def run_study(study: Study, states: dict[Run, State], num_workers: int, display: Display) -> list[Run]:
    """Does what isn't done. Returns the runs that failed, those without a start among them."""
    starts = _Pool(num_workers, display)
    starts.work([(run, states[run]) for run in study.prepares if states[run] != "done"])
    cells = _Pool(num_workers, display)
    blocked = [run for run in study.runs if run.start in starts.failed]
    cells.work([(run, states[run]) for run in study.runs if states[run] != "done" and run not in blocked])
    return [*starts.failed, *blocked, *cells.failed]


@dataclass
class _Attempt:
    run: Run
    record: Record
    process: subprocess.Popen[bytes]
    began: float
    touched: float


class _Pool:
    def __init__(self, size: int, display: Display) -> None:
        self.size, self.display = size, display
        self.running: list[_Attempt] = []
        self.failed: list[Run] = []

    def work(self, todo: Sequence[tuple[Run, State]]) -> None:
        queue = list(todo)
        try:
            while queue or self.running:
                while queue and len(self.running) < self.size:
                    self.running.append(self._start(*queue.pop(0)))
                self.display.tick([attempt.run for attempt in self.running])
                time.sleep(_POLL_S)
                for attempt in list(self.running):
                    if attempt.process.poll() is not None:
                        self._end(attempt)
                    elif time.monotonic() > attempt.touched + SIGN_OF_LIFE_S:
                        attempt.touched = time.monotonic()
                        (attempt.run.path / RECORD_FILE).touch()
        finally:
            self._stop()

    def _start(self, run: Run, state: State) -> _Attempt:
        if state == "resume":
            arguments = ["--resume", str(run.path)]
            record = read_record(run.path) or new_record(run)
        else:
            shutil.rmtree(run.path, ignore_errors=True)
            run.path.mkdir(parents=True)
            arguments = [str(run.base), *run.overrides]
            record = new_record(run)
        record.state, record.error, record.attempts = "running", [], record.attempts + 1
        with (run.path / OUTPUT_FILE).open("ab") as output:
            # A session of its own: a Ctrl-C of the terminal comes to the study alone, which ends its runs in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "drpo_megatron.cli", "train", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        record.host = socket.gethostname()
        record.pid, record.pid_created = process.pid, psutil.Process(process.pid).create_time()
        record.save(run.path)
        self.display.started(run, state)
        return _Attempt(run, record, process, time.monotonic(), time.monotonic())

    def _end(self, attempt: _Attempt) -> None:
        self.running.remove(attempt)
        record = attempt.record
        code = attempt.process.returncode
        record.state = "done" if code == 0 and _has_finished(attempt.run) else "failed"
        if record.state == "failed":
            output = (attempt.run.path / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")
            record.error = [*output.splitlines()[-_ERROR_LINES:], f"(exit code {code})"]
            if attempt.run.cell != PREPARE and _DIVERGED.search(output):
                record.state = "diverged"
            else:
                self.failed.append(attempt.run)
        self._close(attempt)
        self.display.ended(attempt.run, record)

    def _stop(self) -> None:
        """After an interrupt: every run ends its own processes; one that doesn't is killed with its children."""
        for attempt in self.running:
            attempt.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for attempt in self.running:
            children = _children(attempt.process.pid)
            try:
                attempt.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                attempt.process.kill()
                for child in children:
                    with suppress(psutil.NoSuchProcess):
                        child.kill()
                attempt.process.wait()
            attempt.record.state = "done" if _has_finished(attempt.run) else "interrupted"
            self._close(attempt)

    def _close(self, attempt: _Attempt) -> None:
        record = attempt.record
        record.pid = record.pid_created = None
        record.seconds += time.monotonic() - attempt.began
        record.save(attempt.run.path)


def _has_finished(run: Run) -> bool:
    return RunDirectory(run.path).summary_file.is_file()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
