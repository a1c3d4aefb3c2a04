"""Real gloo ranks for tests: every rank is a process of its own that joins one process group and calls one function.

    def all_reduced(rank: int, world_size: int, scale: float) -> float:
        total = torch.tensor(scale * rank)
        dist.all_reduce(total)
        return total.item()

    assert run_ranks(2, all_reduced, 10.0) == [10.0, 10.0]

The function lives at the top of a test module, because the ranks import it by name. Ranks that outlive a failure or
the time limit are killed together with the processes they started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo ranks, in spawned processes.

    The default process group is initialised before the call and destroyed after it. Each rank runs one thread.

    Returns: the value of every rank, in rank order (saved with torch.save: tensors, containers, picklable objects).
    Raises: RuntimeError with the rank and the traceback of the first rank that failed; TimeoutError after timeout_s.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        context = multiprocessing.get_context("spawn")
        ranks: list[BaseProcess] = []
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name, value in _rank_environment().items():
                    patch.setenv(name, value)
                for rank in range(world_size):
                    arguments = (rank, world_size, scratch, timeout_s, function, args)
                    process = context.Process(target=_rank_main, args=arguments, name=f"rank{rank}")
                    process.start()
                    ranks.append(process)
            _wait_for_all(ranks, Path(scratch), timeout_s)
        finally:
            _kill(ranks)
        return [torch.load(_result_path(scratch, rank), weights_only=False) for rank in range(world_size)]


def _wait_for_all(ranks: list[BaseProcess], scratch: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            del running[sentinel]  # type: ignore[arg-type]
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed:
            raise RuntimeError(_first_failure(ranks, failed, scratch))
        if running and time.monotonic() >= deadline:
            names = ", ".join(process.name for process in running.values())
            raise TimeoutError(f"{names} of {len(ranks)} ranks still ran after timeout_s={timeout_s:g}")


def _first_failure(ranks: list[BaseProcess], failed: list[int], scratch: Path) -> str:
    """The earliest traceback is the cause; the others usually only lost their peer."""
    reports = sorted(scratch.glob("error-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        return f"rank {reports[0].stem.removeprefix('error-')} of {len(ranks)} failed:\n{reports[0].read_text()}"
    codes = ", ".join(f"rank {rank} exited with {ranks[rank].exitcode}" for rank in failed)
    return f"{codes} without a traceback"


def _kill(ranks: list[BaseProcess]) -> None:
    for process in ranks:
        if process.is_alive() and process.pid is not None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
        process.join()


def _rank_main(
    rank: int, world_size: int, scratch: str, timeout_s: float, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        torch.set_num_threads(1)
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
        sys.exit(1)


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
