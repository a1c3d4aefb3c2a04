"""Many small tasks by a few threads, within a limit of memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Task = TypeVar("Task")

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

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="convert") as pool:
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
