"""`drpo-megatron doctor`: is this machine, or each of several nodes, fit for a run, and what to do where it isn't."""

from __future__ import annotations

import argparse
import io
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput, RunFailed, accept

if TYPE_CHECKING:
    from drpo_megatron.doctor.nodes import Report

_HELP = """\
Look at versions and whether they go together, GPUs and their links, the network, the run directory's file system,
shared memory, ports, clock and limits. One line each: ok, warn or fail, and what to do. Exit code 1 when a line fails
or, with --compare, when nodes differ.

With --accept the whole path is run, stage by stage: collectives, the loss kernel, a step of every layout, recipes, an
SGLang server, the quickstart, throughput. Exit code 0 when nothing failed. See docs/gpu.md.

examples:
  drpo-megatron doctor
  drpo-megatron doctor --run-dir /shared/runs --sglang-python /shared/sglang/bin/python
  srun --ntasks-per-node=1 drpo-megatron doctor --json | drpo-megatron doctor --compare -
  drpo-megatron doctor --accept                 # on a new GPU machine: what `make gpu-check` does
"""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("doctor", help="check this machine, or several nodes", description=_HELP, **style)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs go; default: runs"
    )
    parser.add_argument(
        "--sglang-python",
        type=Path,
        default=Path(".venv-sglang/bin/python"),
        metavar="FILE",
        help="interpreter with SGLang; default: .venv-sglang/bin/python",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.add_argument(
        "--compare", metavar="FILE", help="of what --json printed on several nodes; - is standard input"
    )
    accept.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.compare is not None:
        _compare(args.compare)
        return
    if args.accept or args.list:
        accept.run(args)
        return
    accept.check_options(args)
    from drpo_megatron.doctor.everything import examine_everything
    from drpo_megatron.doctor.nodes import Report

    report = Report(socket.gethostname(), tuple(examine_everything(args.run_dir, args.sglang_python)))
    if args.json:
        print(report.to_json())
    else:
        _print(report)
    if report.failed:
        raise RunFailed(
            f"{len(report.failed)} line(s) failed on {report.node}: {', '.join(f.name for f in report.failed)}"
        )


def _compare(source: str) -> None:
    from drpo_megatron.doctor.nodes import odd_ones, read_reports
    from drpo_megatron.reading import read_text

    try:
        text = _standard_input() if source == "-" else read_text(source)
        reports = read_reports(text.splitlines())
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    if odd := odd_ones(reports):
        raise RunFailed("\n".join([f"{len(reports)} nodes, and they are not fit to run together:", *odd]))
    print(f"{len(reports)} nodes are alike, and nothing failed")


def _standard_input() -> str:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # Whatever other nodes' terminals print.
    return sys.stdin.read()


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(report.node)
    for finding in report.findings:
        status = f"[{_COLOURS[finding.status]}]{finding.status:<5}[/]"
        console.print(status, f"{finding.name:<20}{finding.found}", f"({finding.detail})" if finding.detail else "")
        if finding.advice:
            console.print(f"      -> {finding.advice}", markup=False)
