"""Where a step's metrics go: the console, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from drpo_megatron.config.sections import MetricsSection
from drpo_megatron.files import CannotWrite, write_text
from drpo_megatron.intervals import HeldOut
from drpo_megatron.reading import parse_json_object, read_text, short

METRICS_FILE = "metrics.jsonl"
_WANDB_ID_FILE = "wandb_id.txt"


class Sink(Protocol):
    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        """What was measured of `step` after it was logged, or without its being logged."""

    def close(self) -> None: ...


class MetricsLogger:
    """Every sink that the `metrics` section asks for. `resume_step` is the step of the checkpoint a run goes on from."""

    def __init__(
        self, run_dir: Path, section: MetricsSection, total_steps: int, resume_step: int | None = None
    ) -> None:
        self.sinks: list[Sink] = [JsonLines(run_dir / METRICS_FILE, resume_step)]
        wanted = section.console
        if wanted == "auto":
            wanted = "progress" if sys.stdout.isatty() else "plain"
        if wanted == "progress":
            self.sinks.append(LiveTable(total_steps, resume_step or 0))
        elif wanted == "plain":
            self.sinks.append(PlainLines(total_steps, resume_step or 0))
        if section.tensorboard:
            self.sinks.append(TensorBoard(run_dir / "tensorboard", resume_step))
        if section.wandb.enabled:
            self.sinks.append(WeightsAndBiases(run_dir, section))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for sink in self.sinks:
            sink.log(step, metrics)

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        if metrics:
            for sink in self.sinks:
                sink.amend(step, metrics)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class JsonLines:
    """One JSON object a step, at once. On resume the steps after the checkpoint's are dropped: none appears twice.

    When the disk is full, the rows wait in memory, and are written when there is room again.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        kept = [] if resume_step is None else [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path, self._file = path, path.open("r+b", buffering=0)
        self._rows: list[dict[str, Any]] = kept[-1:]
        """The last one, which may still be amended, and before it those that wait."""
        last = len(json.dumps(kept[-1])) + 1 if kept else 0
        self._offset = path.stat().st_size - last
        """Of the first of them in the file."""
        self._has_warned = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._rows.append({"step": step} | _as_json(metrics))
        self._write()

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        if not self._rows or self._rows[-1]["step"] != step:
            self._rows.append({"step": step})
        self._rows[-1] |= _as_json(metrics)
        self._write()

    def close(self) -> None:
        self._file.close()

    def _write(self) -> None:
        lines = [json.dumps(row).encode() + b"\n" for row in self._rows]
        try:
            self._file.seek(self._offset)
            rest = memoryview(b"".join(lines))
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                print(f"warning: {CannotWrite.because(self._path, error)}. Its rows wait until they can be", flush=True)
            return
        self._rows = self._rows[-1:]
        self._offset += sum(map(len, lines[:-1]))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    *lines, rest = read_text(path).split("\n")
    rows = [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    with suppress(ValueError):
        rows.append(_row(rest, str(path)))
    return rows


def _row(line: str, place: str) -> dict[str, Any]:
    """A step's numbers. A null is a mean of nothing."""
    row = parse_json_object(line, place)
    for name, value in row.items():
        if not _is_number(value) and not (value is None and name != "step"):
            raise ValueError(f"{place}: {short(name)} is {short(repr(value))}, which is no number; remove the line")
    if type(row.get("step")) is not int:
        raise ValueError(f"{place}: step is {short(repr(row.get('step')))}, which is no whole number; remove the line")
    return row


def _is_number(value: Any) -> bool:
    """That a float holds it: 1e999 is read as infinity, and of whole numbers Python has all."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _as_json(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: an empty mean is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def headline(metrics: dict[str, float]) -> dict[str, str]:
    """What a person watches, as text: reward, mismatch, DRPO weight range, throughput."""

    def number(name: str, form: str) -> str:
        value = metrics.get(name)
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    cells = {
        "reward": number("reward/mean", ".3f"),
        "|pi-mu|": number("mismatch/abs_prob_shift/mean", ".1e"),
        "w": f"{number('objective/weight/min', '.2f')}..{number('objective/weight/max', '.2f')}",
        "entropy": number("policy/entropy/mean", ".3f"),
        "grad": number("optim/grad_norm", ".2f"),
        "gen tok/s": number("throughput/generate_tokens_per_s", ",.0f"),
        "train tok/s": number("throughput/train_tokens_per_s", ",.0f"),
    }
    if "throughput/mfu" in metrics:  # On GPUs.
        cells["MFU"] = number("throughput/mfu", ".1%")
    return cells


class PlainLines:
    """One line a step, for logs and CI."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self.started = time.monotonic()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        parts = [f"step {step}/{self.total_steps}"]
        if "reward/mean" in metrics:
            parts += [f"{name} {value}" for name, value in headline(metrics).items()]
        if (heldout := HeldOut.of(metrics)) is not None:
            parts.append(f"held-out {heldout.name} {heldout.text()}")
        done = step - self.first_step
        if done > 0:
            parts.append(f"left {(time.monotonic() - self.started) / done * (self.total_steps - step):.0f} s")
        print("  ".join(parts), flush=True)

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        if (heldout := HeldOut.of(metrics)) is not None:
            print(f"step {step}/{self.total_steps}  held-out {heldout.name} {heldout.text()}", flush=True)

    def close(self) -> None: ...


class LiveTable:
    """A progress bar with the time left, over a table of the latest step."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("training", total=total_steps, completed=first_step)
        self.heldout = {"held-out": "-"}
        self.latest: dict[str, float] = {}
        self.live = Live(self.bar, console=Console(), refresh_per_second=4)
        self.live.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.latest = metrics
        if (heldout := HeldOut.of(metrics)) is not None:
            self.heldout = {f"held-out {heldout.name}": heldout.text()}
        cells = headline(metrics) | self.heldout
        table = Table(*cells, box=None, pad_edge=False)
        table.add_row(*cells.values())
        layout = Table.grid()
        layout.add_row(self.bar)
        layout.add_row(table)
        self.bar.update(self.task, completed=step)
        self.live.update(layout)

    def amend(self, step: int, metrics: dict[str, float]) -> None:
        self.log(step, self.latest | metrics)

    def close(self) -> None:
        self.live.stop()


class TensorBoard:
    def __init__(self, directory: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # Seconds to import, and most runs do without.

        self.writer = SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    amend = log

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """Offline by default: needs no account and no network. The run id is kept, so that a resumed run is the same run."""

    def __init__(self, run_dir: Path, section: MetricsSection) -> None:
        import wandb  # Seconds to import, and most runs do without.

        id_file = run_dir / _WANDB_ID_FILE
        known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
        self.run = wandb.init(
            project=section.wandb.project,
            entity=section.wandb.entity,
            mode=section.wandb.mode,
            name=run_dir.name,
            dir=str(run_dir),
            id=known,
            resume="allow" if known else None,
            settings=wandb.Settings(silent=True),
        )
        write_text(id_file, self.run.id + "\n")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    amend = log

    def close(self) -> None:
        self.run.finish()
