"""`drpo-megatron doctor --accept`: does the whole path work on this machine, stage by stage."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput, RunFailed, raise_interrupt
from drpo_megatron.commands.arguments import real, whole

if TYPE_CHECKING:
    from drpo_megatron.doctor.accept.report import Report
    from drpo_megatron.doctor.accept.stage import Settings

_DEFAULT_CPU_RANKS = 2
_LOOK_TIMEOUT_S = 600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--accept")
    group.add_argument(
        "--accept",
        action="store_true",
        help="run the whole path in stages and write a report; continues one that broke off",
    )
    group.add_argument("--list", action="store_true", help="the stages, and what the report has of them; runs nothing")
    group.add_argument("--stages", metavar="A,B", help="only these")
    group.add_argument("--again", action="store_true", help="also those that the report has as passed or failed")
    group.add_argument(
        "--device", choices=("auto", "gpu", "cpu"), default="auto", help="auto (default): gpu where torch sees one"
    )
    group.add_argument(
        "--num-devices",
        type=whole(1, 4096),
        metavar="N",
        help=f"GPUs to use, default: all; ranks on a CPU, default: {_DEFAULT_CPU_RANKS}",
    )
    group.add_argument(
        "--size", choices=("auto", "tiny", "full"), default="auto", help="auto (default): full on a GPU, tiny on a CPU"
    )
    group.add_argument(
        "--patience", type=real(0.01, 1000), default=1.0, metavar="X", help="factor on the stages' time limits"
    )
    group.add_argument(
        "--report",
        type=Path,
        default=Path("gpu-report"),
        metavar="NAME",
        help="NAME.md, NAME.json and the directory NAME with logs; default: gpu-report",
    )


def check_options(args: argparse.Namespace) -> None:
    """BadInput for what makes sense with --accept only, and was given without."""
    if given := [name for name in ("stages", "again", "num_devices") if getattr(args, name)]:
        raise BadInput(f"--{given[0].replace('_', '-')} is an option of --accept, which was not given")


def run(args: argparse.Namespace) -> None:
    from drpo_megatron.doctor.accept.display import make_display
    from drpo_megatron.doctor.accept.report import Report
    from drpo_megatron.doctor.accept.runner import run_stages
    from drpo_megatron.doctor.accept.stages import STAGES, choose

    signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        chosen = choose(args.stages)
        identity = _look(args.sglang_python)
        settings = _settings(args, identity)
        args.report.parent.mkdir(parents=True, exist_ok=True)
        report = Report.open(args.report, identity, settings)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    if report.note:
        print(report.note, flush=True)
    if args.list:
        _print_list(report)
        return
    print(_headline(report), flush=True)
    display = make_display(len(chosen))
    try:
        with _alone(Path(settings.scratch)):
            failed = run_stages(chosen, report, STAGES, display, args.again, args.patience)
    finally:
        display.close()
    print(f"report: {report.markdown_file}, {report.json_file}", flush=True)
    if failed:
        names = ",".join(stage.name for stage in failed)
        raise RunFailed(
            f"{len(failed)} stage(s) failed: {names}\n"
            f"when that is mended: drpo-megatron doctor --accept --again --stages {names}"
        )


def _settings(args: argparse.Namespace, identity: dict[str, Any]) -> Settings:
    from drpo_megatron.doctor.accept.stage import Settings

    there = len(identity["devices"])
    device = ("gpu" if there else "cpu") if args.device == "auto" else args.device
    if device == "gpu" and not there:
        raise ValueError(
            f"--device gpu, but torch {identity['versions']['torch']} sees no CUDA device; look at drpo-megatron doctor, or "
            "run the same stages at tiny size with --device cpu"
        )
    wanted = args.num_devices if args.num_devices is not None else there if device == "gpu" else _DEFAULT_CPU_RANKS
    if wanted < 1 or (device == "gpu" and wanted > there):
        limit = f"1 to {there}, as many as torch sees" if device == "gpu" else "1 or more"
        raise ValueError(f"--num-devices {wanted}: give {limit}")
    size = args.size if args.size != "auto" else "full" if device == "gpu" else "tiny"
    return Settings(
        device=device,
        num_devices=wanted,
        size=size,
        scratch=str(args.report.absolute()),
        sglang_python=str(args.sglang_python),
        run_dir=str(args.run_dir),
    )


def _look(sglang_python: Path) -> dict[str, Any]:
    """At the machine, in a process of its own. Raises RunFailed when even that crashes."""
    command = [sys.executable, "-m", "drpo_megatron.doctor.accept.identity", str(sglang_python)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_LOOK_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RunFailed(
            f"looking at the devices takes longer than {_LOOK_TIMEOUT_S:.0f} s: is nvidia-smi answered?"
        ) from error
    if asked.returncode:
        last = "\n".join(asked.stderr.strip().splitlines()[-8:])
        raise RunFailed(f"looking at the devices ended with exit code {asked.returncode}:\n{last}")
    return dict(json.loads(asked.stdout.strip().splitlines()[-1]))


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """One check at a time in a directory."""
    scratch.mkdir(parents=True, exist_ok=True)
    lock = os.open(scratch, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BadInput(
            f"{scratch}: another check is writing this report; wait for it, or give another --report"
        ) from error
    finally:
        os.close(lock)


def _headline(report: Report) -> str:
    devices = report.identity["devices"]
    what = ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices)) or "no GPU"
    settings = report.settings
    line = f"{report.identity['host']}: {what}; stages run on {settings.num_devices} {settings.device}(s), size {settings.size}"
    return line if settings.device == "gpu" else f"{line}: this proves nothing of a GPU"


def _print_list(report: Report) -> None:
    from drpo_megatron.doctor.accept.stages import STAGES

    for stage in STAGES:
        known = report.outcomes.get(stage.name)
        print(
            f"{stage.name:<12} {known.status if known else 'not run':<8} limit {stage.timeout_s:4.0f} s  {stage.proves}"
        )
