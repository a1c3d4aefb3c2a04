"""What a person sees while a study runs: a live table in a terminal, a line a run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.table import Table

from drpo_megatron.intervals import HeldOut
from drpo_megatron.sinks import METRICS_FILE, read_metrics
from drpo_megatron.study.cells import Record, State
from drpo_megatron.study.runs import Run

_REFRESH_S = 1.0


class Lines:
    """One line when a run starts and one when it ends."""

    def __init__(self, num_todo: int) -> None:
        self.num_todo = num_todo
        self.num_ended = 0
        self.began = time.monotonic()

    def started(self, run: Run, state: State) -> None:
        self.say(f"{'continuing' if state == 'resume' else 'starting'} {run.title}")

    def ended(self, run: Run, record: Record) -> None:
        self.num_ended += 1
        what = f"{record.state} after {record.seconds:.0f} s"
        if record.state in ("failed", "diverged"):
            what += f": {next((line for line in record.error if line.startswith('error')), record.error[-1])}"
        elif heldout := _heldout(run):
            what += f", held-out {heldout}"
        self.say(f"[{self.num_ended}/{self.num_todo}] {run.title}: {what}; {self.left()}")

    def tick(self, running: Sequence[Run]) -> None: ...

    def say(self, text: str) -> None:
        print(text, flush=True)

    def left(self) -> str:
        """From the pace so far."""
        num_left = self.num_todo - self.num_ended
        if not num_left:
            return "none left"
        if not self.num_ended:
            return f"{num_left} left"
        seconds = (time.monotonic() - self.began) / self.num_ended * num_left
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def close(self) -> None: ...


class LiveTable(Lines):
    """The same lines, scrolling away above a table of what is running."""

    def __init__(self, num_todo: int) -> None:
        super().__init__(num_todo)
        self.live = Live(console=Console(), refresh_per_second=4)
        self.live.start()
        self.next = 0.0

    def tick(self, running: Sequence[Run]) -> None:
        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + _REFRESH_S
        table = Table("running", "step", "reward", box=None, title=f"{self.num_ended}/{self.num_todo}, {self.left()}")
        for run in running:
            rows = read_metrics(run.path / METRICS_FILE)
            last = rows[-1] if rows else {}
            reward = last.get("reward/mean")
            table.add_row(
                run.title,
                f"{last.get('step', 0)}/{run.config.run.num_steps}",
                "-" if reward is None else f"{reward:.3f}",
            )
        self.live.update(table)

    def say(self, text: str) -> None:
        self.live.console.print(text, highlight=False)

    def close(self) -> None:
        self.live.stop()


def make_display(num_todo: int) -> Lines:
    return (LiveTable if sys.stdout.isatty() else Lines)(num_todo)


def _heldout(run: Run) -> str:
    """`accuracy 51.0% (...) -> 63.2% (...)`, of the first and the last evaluation."""
    found = [HeldOut.of(row) for row in read_metrics(run.path / METRICS_FILE)]
    measured = [result for result in found if result is not None]
    if not measured:
        return ""
    is_accuracy = all(result.is_accuracy for result in measured)
    ends = [replace(result, is_accuracy=is_accuracy) for result in (measured[0], measured[-1])]
    return f"{ends[0].name} " + " -> ".join(dict.fromkeys(result.text() for result in ends))
