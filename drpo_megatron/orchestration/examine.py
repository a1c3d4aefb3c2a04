"""What a silent process is at: stopped, gone or running; and its stack, in its own log."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from drpo_megatron.orchestration.actors import STACK_SIGNAL

if TYPE_CHECKING:
    from drpo_megatron.orchestration.workers import Process

_PATIENCE_S = 20.0
"""For the answer of another machine, which starts a process for it."""
_STACKS_S = 0.5
"""What writing the stacks takes."""


def examine(processes: Sequence[Process], *, write_stacks: bool) -> dict[Process, str]:
    """Of each, `stopped` (SIGSTOP, a debugger), `gone`, `running`, or `unknown` when its machine doesn't answer.

    With `write_stacks` each writes its stack into its log; one that is stopped is woken up for that.
    """
    by_machine: dict[str, list[Process]] = {}
    for process in processes:
        if process.place is not None:
            by_machine.setdefault(process.place.node_id, []).append(process)
    found: dict[Process, str] = {}
    for node_id, there in by_machine.items():
        pids = [process.place.pid for process in there if process.place is not None]
        states = _look_on(node_id, pids, write_stacks)
        found |= dict(zip(there, states, strict=True))
    return found


def _look_on(node_id: str, pids: list[int], write_stacks: bool) -> list[str]:
    if node_id == ray.get_runtime_context().get_node_id():
        return look(pids, write_stacks)
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    answer = ray.remote(look).options(num_cpus=0, scheduling_strategy=there).remote(pids, write_stacks)
    try:
        return ray.get(answer, timeout=_PATIENCE_S)
    except ray.exceptions.RayError:
        return ["unknown"] * len(pids)


def look(pids: Sequence[int], write_stacks: bool) -> list[str]:
    """Of processes on this machine."""
    states = [_state(pid) for pid in pids]
    if write_stacks:
        for pid, state in zip(pids, states, strict=True):
            if state != "gone" and _listens(pid):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, STACK_SIGNAL)
                    os.kill(pid, signal.SIGCONT)
        time.sleep(_STACKS_S)
    return states


def _state(pid: int) -> str:
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"
    if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
        return "stopped"
    return "gone" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "running"


def _listens(pid: int) -> bool:
    """Whether it would write its stack: the signal ends a process that has no handler for it."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (STACK_SIGNAL - 1) & 1)
    return False
