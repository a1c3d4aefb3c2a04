"""Many small tasks by a few threads, within a limit of memory, and files that reach the disk beside them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from drpo_megatron.checkpoint.safetensors_file import flush_file

Task = TypeVar("Task")

NUM_WORKERS = 4
"""Also where there are fewer cores: they wait for the disk by turns."""
MAX_BYTES = 512 * 2**20
"""What tasks may hold together. One that needs more runs alone."""


def run_tasks(
    tasks: Sequence[Task],
    work: Callable[[Task], None],
    num_bytes: Callable[[Task], int],
) -> None:
    """`work(task)` for all, begun in order. Raises what the first failing one raised; the others are not begun.

    Threads suffice: reading, writing and copying tensors all release Python's lock.

    Args:
        num_bytes: what a task needs in memory.
    """
    free, has_room, stop = MAX_BYTES, threading.Condition(), False

    def run(task: Task) -> None:
        nonlocal free
        needed = min(num_bytes(task), MAX_BYTES)
        with has_room:
            has_room.wait_for(lambda: free >= needed or stop)
            if stop:
                return
            free -= needed
        try:
            work(task)
        finally:
            with has_room:
                free += needed
                has_room.notify_all()

    with _frozen_objects(), ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="convert") as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # Also when Ctrl-C ends the wait.
            with has_room:
                stop = True
                has_room.notify_all()
            pool.shutdown(wait=True, cancel_futures=True)
    for future in done:
        future.result()


@contextmanager
def flushing(flush: Callable[[Path], None] = flush_file) -> Iterator[Callable[[Path], None]]:
    """A function that takes finished files, from any thread, and writes them to the disk beside the work that goes on.

    At the end of the block all of them are there. Raises OSError there when one could not be written.

    Args:
        flush: does it.
    """
    flushed: list[Future[None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as pool:
        try:
            yield lambda file: flushed.append(pool.submit(flush, file))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for done in flushed:
        done.result()


@contextmanager
def _frozen_objects() -> Iterator[None]:
    """What torch, Megatron and the plan of a model consist of stays: the garbage collector need not look at it again."""
    was_enabled = gc.isenabled()
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
        if not was_enabled:
            gc.disable()
