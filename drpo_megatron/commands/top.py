"""`drpo-megatron top`: follow a run in a terminal, from its metrics.jsonl alone."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput
from drpo_megatron.commands.arguments import real
from drpo_megatron.reading import short

if TYPE_CHECKING:
    from rich.console import RenderableType

_HELP = """\
Follow a run: reward, mismatch, staleness, throughput, where a step's time goes, memory of the trainer's ranks. Reads the
run directory and nothing else, so any machine that sees it will do; ends when the run has, or with Ctrl-C.

examples:
  drpo-megatron top runs/quickstart-20260101-120000
  ssh cluster drpo-megatron top /shared/runs/my-run --once
"""
_ROWS = (
    ("reward", "reward/mean", ".3f"),
    ("held-out accuracy", "eval/accuracy", ".3f"),
    ("held-out mean reward", "eval/reward/mean", ".3f"),
    ("  95 % from", "eval/reward/low", ".3f"),
    ("  95 % to", "eval/reward/high", ".3f"),
    ("|pi-mu| to the engine", "mismatch/abs_prob_shift/mean", ".1e"),
    ("|pi-mu| after updates", "shift/abs_prob_shift/mean", ".1e"),
    ("smallest weight w", "objective/weight/min", ".3f"),
    ("beyond the boundary", "objective/beyond_boundary_share", ".2%"),
    ("entropy", "policy/entropy/mean", ".3f"),
    ("gradient norm", "optim/grad_norm", ".3f"),
    ("response tokens", "rollout/response_length/mean", ",.0f"),
    ("cut at the limit", "rollout/truncated_share", ".1%"),
    ("equal groups", "rollout/equal_group_share", ".1%"),
    ("staleness, versions", "rollout/staleness/max", ".0f"),
    ("generated tokens/s", "throughput/generate_tokens_per_s", ",.0f"),
    ("trained tokens/s", "throughput/train_tokens_per_s", ",.0f"),
    ("MFU", "throughput/mfu", ".1%"),
)
_METRICS, _SUMMARY = "metrics.jsonl", "summary.json"
_NUM_DRAWN = 20
"""Steps in the little curves: the table is made for 80 columns."""
_NUM_AVERAGED = 10
_MAX_RANKS = 16
_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR = 30


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("top", help="follow a run in a terminal", description=_HELP, **style)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="of a run that goes on, or has ended")
    parser.add_argument("--once", action="store_true", help="print the present state and end")
    parser.add_argument(
        "--interval", type=real(0.1, 3600), default=2.0, metavar="S", help="seconds between looks; default 2"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    try:
        _follow(args)
    except (ValueError, OSError) as error:  # Of the files of the run, which name themselves.
        raise BadInput(error) from error


def _follow(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.live import Live

    directory: Path = args.run_dir
    if not (directory / "config.yaml").is_file():
        raise BadInput(f"{directory} is no run directory: config.yaml is missing")
    console = Console()
    if args.once:
        console.print(frame(directory))
        return
    with Live(frame(directory), console=console, auto_refresh=False) as live:
        while not _has_ended(directory):
            time.sleep(args.interval)
            live.update(frame(directory), refresh=True)
        live.update(frame(directory), refresh=True)


def frame(directory: Path) -> RenderableType:
    """The state of a run as it is on the disk. A line that is being written is not there yet."""
    from rich.console import Group

    from drpo_megatron.config import load_resolved
    from drpo_megatron.sinks import read_metrics

    config = load_resolved(directory / "config.yaml")
    file = directory / _METRICS
    rows = [row for row in read_metrics(file) if row["step"] > 0]
    if not rows:
        return f"no step is done yet\nlogs: {directory / 'logs'}"
    for row in rows:
        if row.get("time/step_s") is None:
            raise BadInput(f"{file}: step {short(row['step'])} has no time/step_s; remove the line")
    age = None if _has_ended(directory) else time.time() - file.stat().st_mtime
    head = _head(directory, rows, config.run.num_steps, age)
    return Group(head, _curves(rows), _times(rows[-1]), _memory(rows[-1]))


def _has_ended(directory: Path) -> bool:
    """A run that ended and was resumed has a summary older than its metrics."""
    summary, metrics = directory / _SUMMARY, directory / _METRICS
    return summary.is_file() and metrics.is_file() and summary.stat().st_mtime_ns >= metrics.stat().st_mtime_ns


def _head(directory: Path, rows: Sequence[dict[str, Any]], num_steps: int, age: float | None) -> str:
    step = rows[-1]["step"]
    recent = [row["time/step_s"] for row in rows[-_NUM_AVERAGED:]]
    seconds = sum(recent) / len(recent)
    if age is None:
        state = "ended"
    else:
        state = f"{_duration(seconds * (num_steps - step))} left, last step logged {_duration(age)} ago"
        # A step that takes this long is worth a look at the logs.
        state += "; slower than before: see its logs/" if age > 5 * seconds + 60 else ""
    return f"[bold]{directory.name}[/]  step {step}/{num_steps}, {seconds:.1f} s a step, {state}"


def _curves(rows: Sequence[dict[str, Any]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("now", f"mean {_NUM_AVERAGED}", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"last {_NUM_DRAWN}", no_wrap=True)
    # Held-out results are shown once: as accuracy where every evaluation has one.
    has_accuracy = all("eval/accuracy" in row for row in rows if "eval/reward/mean" in row)
    hidden = "eval/reward/mean" if has_accuracy else "eval/accuracy"
    for label, name, form in _ROWS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values or name == hidden:
            continue
        recent = values[-_NUM_AVERAGED:]
        numbers = (values[-1], sum(recent) / len(recent), min(values), max(values))
        table.add_row(label, *(format(number, form) for number in numbers), sparkline(values[-_NUM_DRAWN:]))
    return table


def sparkline(values: Sequence[float]) -> str:
    """One block a value, from the lowest to the highest of them."""
    low, span = min(values), max(values) - min(values)
    if not 0 < span < math.inf:
        return _BLOCKS[0] * len(values)
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def _times(row: dict[str, Any]) -> RenderableType:
    """Of the last step. Generation may overlap with training."""
    named = {
        name[5:-2]: value
        for name, value in row.items()
        if name.startswith("time/") and name.endswith("_s") and value is not None
    }
    step = named.pop("step")
    named = dict(sorted(named.items(), key=lambda item: -item[1]))
    return _bars("seconds of the last step", {name: (value, f"{value:.1f}") for name, value in named.items()}, step)


def _memory(row: dict[str, Any]) -> RenderableType:
    prefix = "memory/trainer_mb/rank"
    ranks = {name[len(prefix) :]: value for name, value in row.items() if name.startswith(prefix) and value is not None}
    most, fullest = row.get("memory/trainer_mb/max"), row.get("memory/trainer_mb/fullest_rank")
    if most is None or fullest is None:
        return ""
    title = f"memory of trainer ranks: at most {most / 1024:.1f} GiB, on rank {fullest}"
    shown = sorted(ranks.items(), key=lambda item: -item[1])[:_MAX_RANKS]
    return _bars(title, {f"rank {rank}": (value, f"{value / 1024:.1f}") for rank, value in shown}, most)


def _bars(title: str, values: dict[str, tuple[float, str]], whole: float) -> RenderableType:
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for label, (value, text) in values.items():
        table.add_row(label, text, "█" * round(_BAR * min(value / whole, 1)) if whole else "")
    return Group(title, table)


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "an unknown time"
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
