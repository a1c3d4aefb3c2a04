"""One worker process as its pool has it in hand, what all of them print, and the guardian that outlives the pool."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from drpo_megatron.imported import module_places
from drpo_megatron.rewards import guardian
from drpo_megatron.rewards.channel import Channel
from drpo_megatron.rewards.worker import Place

_KILL_S = 60.0
"""How long the kernel may take to end what was killed; a process that waits for a dead disk stays longer."""
_MAX_OUTPUT = 16 * 2**20
"""Bytes that the workers of a pool may print in all."""
_START = """\
import json, sys
settings = json.loads(sys.argv.pop())
sys.path[:] = settings.pop("places")
from drpo_megatron.rewards.worker import main
main(settings)
"""


class WorkerProcess:
    """Started, but not ready before it says so through its channel.

    Its environment carries a mark that begins with `mark`; it leads a session of its own, which no Ctrl-C reaches.
    """

    def __init__(self, mark: str, settings: dict[str, Any], output: Output) -> None:
        """settings: what `worker.main` takes, without file descriptors."""
        self._mark = f"{mark}.{uuid.uuid4().hex}"
        self.started = time.monotonic()
        self.is_ready = False
        ours, theirs = socket.socketpair()
        file, self.place = Place.make()
        descriptors = {"connection": theirs.fileno(), "place": file}
        settings = settings | descriptors | {"places": module_places(), "mark": self._mark}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(settings)],
                env=os.environ | {guardian.MARK: self._mark},
                pass_fds=list(descriptors.values()),
                stdin=subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            self.place.close()
            raise
        finally:
            theirs.close()
            os.close(file)
        self.channel = Channel(ours)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self, grace_s: float = 0.0) -> int | None:
        """It, and all that it started. The exit code: its own if it ended by itself, or does within `grace_s`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        end_all(self._mark, [self])
        return self._process.returncode


def end_all(mark: str, workers: Sequence[WorkerProcess]) -> None:
    """All processes whose mark begins so, `workers` among them."""
    guardian.kill_marked(mark, [worker._process.pid for worker in workers])
    for worker in workers:
        worker._process.kill()
        with suppress(subprocess.TimeoutExpired):
            worker._process.wait(_KILL_S)
        worker.channel.close()
        worker.place.close()


class Output:
    """What the workers print goes to our own stderr, up to a limit: a flood fills no disk."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self._num_left = _MAX_OUTPUT

    def pass_on(self) -> None:
        for _ in range(16):
            try:
                data = os.read(self.read_end, 2**16)
            except BlockingIOError:
                return
            if not self._num_left:
                continue
            shown = data[: self._num_left]
            self._num_left -= len(shown)
            if not self._num_left:
                shown += b"\n--- what rewards print from here on is dropped: it is more than 16 MiB\n"
            with suppress(OSError):
                os.write(2, shown)

    def close(self) -> None:
        self.pass_on()
        os.close(self.read_end)
        os.close(self.write_end)


def start_guardian(mark: str) -> int:
    """It ends all workers with the mark when this process ends, in whatever way, or closes the file that is returned."""
    read, write = os.pipe()
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", guardian.__file__, mark, str(read)],
            pass_fds=[read],
            cwd="/",
            env={name: value for name, value in os.environ.items() if name != guardian.MARK},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            check=True,
        )
    finally:
        os.close(read)
    return write
