"""Real gloo ranks for tests: every rank is a process of its own that joins one process group and calls one function.

    def all_reduced(rank: int, world_size: int, scale: float) -> float:
        total = torch.tensor(scale * rank)
        dist.all_reduce(total)
        return total.item()

    assert run_ranks(2, all_reduced, 10.0) == [10.0, 10.0]

The function lives at the top of a test module, because the ranks import it by name. Processes are kept for the next call:
importing torch and Megatron costs more than most tests. One that failed, or whose environment the function changed, is
not used again. Ranks that outlive a failure or the time limit are killed together with the processes they started.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.gloo import share_device

_MAX_BYTES = 3 * 2**30
"""A rank that holds more is not kept."""


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection


_idle: list[_Rank] = []


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0, fresh: bool = False
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo ranks, in processes of their own.

    The default process group is initialised before the call and destroyed after it. Each rank runs one thread.
    fresh: in new processes, which end with the call. For functions that patch what they import, or end their process.

    Returns: the value of every rank, in rank order (saved with torch.save: tensors, containers, picklable objects).
    Raises: RuntimeError with the rank and the traceback of the first rank that failed; TimeoutError after timeout_s.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        ranks: list[_Rank] = []
        try:
            while len(ranks) < world_size:
                ranks.append(_take(fresh))
            for rank, taken in enumerate(ranks):
                with contextlib.suppress(OSError):  # It died; the wait below says so.
                    taken.connection.send((rank, world_size, scratch, timeout_s, function, args))
            kept = _wait_for_all(ranks, Path(scratch), timeout_s)
        except BaseException:
            _kill(ranks)
            raise
        _kill([taken for taken in ranks if fresh or taken not in kept])
        _idle.extend(taken for taken in kept if not fresh)
        return [torch.load(_result_path(scratch, rank), weights_only=False) for rank in range(world_size)]


def _take(fresh: bool) -> _Rank:
    while _idle and not fresh:
        taken = _idle.pop()
        if taken.process.is_alive():
            return taken
        _kill([taken])
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _rank_environment().items():
            patch.setenv(name, value)
        process = context.Process(target=_rank_main, args=(its,))
        process.start()
    its.close()
    return _Rank(process, ours)


def _wait_for_all(ranks: list[_Rank], scratch: Path, timeout_s: float) -> list[_Rank]:
    """Those that can be used again."""
    deadline = time.monotonic() + timeout_s
    running, kept = dict(enumerate(ranks)), []
    while running:
        wait([taken.connection for taken in running.values()], timeout=max(0.0, deadline - time.monotonic()))
        for rank, taken in list(running.items()):
            if not taken.connection.poll():
                continue
            try:
                if taken.connection.recv():
                    kept.append(taken)
            except (EOFError, OSError):
                taken.process.join(10)
                raise RuntimeError(_first_failure(ranks, scratch)) from None
            del running[rank]
        if running and time.monotonic() >= deadline:
            names = ", ".join(f"rank{rank}" for rank in running)
            raise TimeoutError(f"{names} of {len(ranks)} ranks still ran after timeout_s={timeout_s:g}")
    return kept


def _first_failure(ranks: list[_Rank], scratch: Path) -> str:
    """The earliest traceback is the cause; the others usually only lost their peer."""
    reports = sorted(scratch.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        return f"rank {reports[0].stem.removeprefix('error-')} of {len(ranks)} failed:\n{reports[0].read_text()}"
    codes = [f"rank {i} exited with {taken.process.exitcode}" for i, taken in enumerate(ranks)]
    return f"{', '.join(code for code in codes if not code.endswith('None'))} without a traceback"


def _kill(ranks: list[_Rank]) -> None:
    for taken in ranks:
        process = taken.process
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            process.kill()
        process.join()
        taken.connection.close()


@atexit.register
def _end_idle() -> None:
    _kill(_idle)
    _idle.clear()


# --- inside a rank ----------------------------------------------------------------------------------------------------


def _rank_main(connection: Connection) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    share_device()
    for job in _jobs(connection):
        before = _surroundings()
        _do(*job)
        _forget()
        unchanged = _surroundings() == before and psutil.Process().memory_info().rss < _MAX_BYTES
        connection.send(unchanged)
        if not unchanged:
            return


def _jobs(connection: Connection) -> Iterator[Any]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def _do(
    rank: int, world_size: int, scratch: str, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{scratch}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(rank, world_size, *args)
        torch.save(result, _result_path(scratch, rank))
        if dist.is_initialized():
            dist.barrier()  # A rank that leaves early closes connections that its peers may still read from.
            dist.destroy_process_group()
    except BaseException:
        Path(scratch, f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # Not by way of threads and handlers that the function left: what it left is not to be used.


def _surroundings() -> tuple[Any, ...]:
    """What a function may have changed for the next one. None of these is worth restoring."""
    platform = sys.modules.get("drpo_megatron.trainer.platform")
    active = getattr(platform, "_active", None)
    return (
        dict(os.environ) | {"TORCHDYNAMO_DISABLE": "1"},  # The CPU platform sets it.
        os.getcwd(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        "cpu cpu" if active is None else f"{active.name} {active.device}",
    )


def _forget() -> None:
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        parallel_state.destroy_model_parallel()
    torch.seed()  # A new process's is another one each time, too: a test that needs one sets it.
    gc.collect()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _result_path(scratch: str, rank: int) -> str:
    return os.path.join(scratch, f"result-{rank}.pt")


def _rank_environment() -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # The host name of a container often resolves to nothing.
    return environment
