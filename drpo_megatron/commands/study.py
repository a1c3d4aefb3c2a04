"""`drpo-megatron study`: run a grid of runs, and report what came out."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput, RunFailed
from drpo_megatron.commands.arguments import whole, whole_list

if TYPE_CHECKING:
    from drpo_megatron.study.cells import State
    from drpo_megatron.study.runs import Run, Study

_HELP = """\
Run every cell of a study's grid with every seed, in runs of `drpo-megatron train`, or write the report of what was run.
What is done is not done again; what was interrupted goes on from its checkpoint. Exit code 1 when a run failed.

examples:
  drpo-megatron study examples/studies/fp8_objectives.yaml --dry-run
  drpo-megatron study examples/studies/fp8_objectives.yaml --workers 2
  drpo-megatron study examples/studies/fp8_objectives.yaml --workers 2 --seeds 0,1,2,3,4
  drpo-megatron study examples/studies/fp8_objectives.yaml --only objective=grpo,spo --only precision=none
  drpo-megatron study examples/studies/fp8_objectives.yaml --slurm="--partition=gpu --gpus-per-node=8 --time=4:00:00"
  drpo-megatron study report runs/fp8_objectives          writes report.html and report.md there
"""


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("study", help="a grid of runs, and its report", description=_HELP, **style)
    parser.add_argument("arguments", nargs="*", metavar="FILE | report RUNS", help="a study's YAML file, or its runs")
    parser.add_argument("--dry-run", action="store_true", help="check every cell, list the runs, start nothing")
    parser.add_argument(
        "--workers", type=whole(1, 4096), default=1, metavar="N", help="runs at the same time; default 1"
    )
    parser.add_argument("--seeds", type=whole_list(0), metavar="0,1,2", help="instead of the file's")
    parser.add_argument(
        "--only", type=_levels, action="append", default=[], metavar="AXIS=LEVEL,LEVEL", help="these cells; repeatable"
    )
    parser.add_argument("--starts", action="store_true", help="make only the start that the cells of a seed share")
    parser.add_argument(
        "--slurm",
        type=shlex.split,
        metavar="OPTIONS",
        help="a Slurm job a run, with these options of sbatch, as one text",
    )
    parser.add_argument("--runs", type=Path, metavar="DIR", help="where the runs are; default runs/<name of the study>")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.arguments[:1] == ["report"] and len(args.arguments) == 2:
        _report(Path(args.arguments[1]))
    elif len(args.arguments) == 1 and args.arguments != ["report"]:
        _study(args)
    else:
        raise BadInput("which study? give one YAML file, such as examples/studies/fp8_objectives.yaml, or: report RUNS")


def _study(args: argparse.Namespace) -> None:
    from drpo_megatron.study.results import save_grid
    from drpo_megatron.study.runner import inspect
    from drpo_megatron.study.runs import load_study

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        study = load_study(Path(args.arguments[0]), args.runs, args.seeds, dict(args.only))
        if args.starts:
            study = replace(study, runs=())
        states = inspect(study)
        if args.dry_run:
            _print_plan(study, states)
            return
        save_grid(study)
        if args.slurm is not None:
            from drpo_megatron.study.slurm import submit

            jobs = submit(study, states, args.slurm)
            print(f"submitted: {', '.join(jobs) or 'nothing, all runs are done'}")
            return
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    _run_all(study, states, args.workers)


def _run_all(study: Study, states: dict[Run, State], num_workers: int) -> None:
    from drpo_megatron.study.display import make_display
    from drpo_megatron.study.runner import run_study

    for warning in study.warnings:
        print(f"warning: {warning}", flush=True)
    num_done = sum(state == "done" for state in states.values())
    print(f"{study.runs_dir}: {len(states)} runs, {num_done} of them done before", flush=True)
    display = make_display(len(states) - num_done)
    try:
        failed = run_study(study, states, num_workers, display)
    except KeyboardInterrupt:
        display.say("interrupted; the same command goes on from here")
        raise
    finally:
        display.close()
    if failed:
        lines = [f"  {run.title}: {run.path / 'output.txt'}" for run in failed]
        raise RunFailed(
            "\n".join([f"{len(failed)} of {len(states)} runs failed; the same command tries again", *lines])
        )
    print(f"all runs are done; next: drpo-megatron study report {study.runs_dir}", flush=True)


def _print_plan(study: Study, states: dict[Run, State]) -> None:
    words: dict[State, str] = {"done": "done", "resume": "to be continued", "new": "to be run"}
    changes = {cell.name: cell.overrides for cell in study.cells}
    for run, state in states.items():
        texts = [f"{key}={json.dumps(value)}" for key, value in changes.get(run.cell, {}).items()]
        print("  ".join([str(run.path), words[state], *texts]))
    for warning in study.warnings:
        print(f"# warning: {warning}")
    counts = [f"{list(states.values()).count(state)} {text}" for state, text in words.items()]
    print(f"# {len(study.cells)} cell(s) x {len(study.file.seeds)} seed(s); runs: {', '.join(counts)}")
    print("# dry run: nothing was started or written")


def _report(runs_dir: Path) -> None:
    from drpo_megatron.study.report import write_report

    try:
        files, notes = write_report(runs_dir)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    for note in notes:
        print(f"note: {note}")
    for file in files:
        print(f"report: {file}")


def _levels(text: str) -> tuple[str, list[str]]:
    axis, separator, levels = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not AXIS=LEVEL,LEVEL, such as objective=grpo,spo")
    return axis, levels.split(",")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt(signum)
