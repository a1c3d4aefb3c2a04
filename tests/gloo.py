"""One TCP loop for all of a test process's gloo groups.

Every group would start a device of its own, whose thread wakes a hundred times a second for as long as anything holds the
group. Ranks that are kept for many tests had more than a thousand of them, and the machine did little else.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import default_pg_timeout


def share_device() -> None:
    """Of every group of this process from now on, over the loopback interface."""
    real, device = ProcessGroupGloo.__init__, ProcessGroupGloo.create_device(interface="lo")

    def init(self: Any, store: Any, rank: int, size: int, *given: Any, timeout: timedelta = default_pg_timeout) -> None:
        if given and isinstance(given[0], ProcessGroupGloo._Options):  # Who chose a device gets it.
            real(self, store, rank, size, *given)
            return
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [device], 2, given[0] if given else timeout
        real(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = init
