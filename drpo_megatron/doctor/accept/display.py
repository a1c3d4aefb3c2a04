"""What a person sees while stages run: a line a stage, and in a terminal the seconds and the last line of its log."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from drpo_megatron.doctor.accept.stage import Outcome, Stage

_COLOURS = {"pass": "green", "fail": "bold red", "skipped": "yellow"}
_REFRESH_S = 0.5


class Display:
    """Lines only, as for a file."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.console = Console(highlight=False, soft_wrap=True)

    def kept(self, index: int, stage: Stage, outcome: Outcome) -> None:
        self._say(index, stage, outcome, f"as on {outcome.ended}; --again runs it again")

    def started(self, index: int, stage: Stage) -> None:
        self.console.print(f"{self._place(index)} {stage.name:<12} {stage.proves} ...")

    def tick(self, log: Path) -> None: ...

    def ended(self, index: int, stage: Stage, outcome: Outcome) -> None:
        self._say(index, stage, outcome, f"{outcome.seconds:.0f} s")

    def close(self) -> None: ...

    def _place(self, index: int) -> str:
        return escape(f"[{index + 1}/{self.num_stages}]")

    def _say(self, index: int, stage: Stage, outcome: Outcome, detail: str) -> None:
        status = f"[{_COLOURS[outcome.status]}]{outcome.status}[/]"
        self.console.print(f"{self._place(index)} {stage.name:<12} {status} ({escape(detail)})")
        if outcome.reason:
            self.console.print("\n".join(f"      {line}" for line in outcome.reason.splitlines()), markup=False)
        for check in outcome.checks:
            if check.status == "skipped" and outcome.status != "skipped":
                self.console.print(f"      skipped: {check.name}: {check.found}", markup=False)


class Live(Display):
    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self.status: Status | None = None

    def started(self, index: int, stage: Stage) -> None:
        self.title, self.began, self.next = f"{self._place(index)} {stage.name}", time.monotonic(), 0.0
        self.status = self.console.status(self.title)
        self.status.start()

    def tick(self, log: Path) -> None:
        if self.status is None or time.monotonic() < self.next:
            return
        self.next = time.monotonic() + _REFRESH_S
        room = max(20, self.console.width - 40)
        self.status.update(
            f"{self.title} {time.monotonic() - self.began:.0f} s  [dim]{escape(_last_line(log)[:room])}[/]"
        )

    def ended(self, index: int, stage: Stage, outcome: Outcome) -> None:
        self.close()
        super().ended(index, stage, outcome)

    def close(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None


def make_display(num_stages: int) -> Display:
    return (Live if sys.stdout.isatty() else Display)(num_stages)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
