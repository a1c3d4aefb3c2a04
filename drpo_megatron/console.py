"""Standard output that may be lost: a closed pipe (`train | head -3`), a terminal that is gone, a log on a full disk.

A run doesn't end with its reader. What is said after that goes to a file, if one was named, or nowhere.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class LastingStream(io.TextIOWrapper):
    """Text to a file descriptor. Never raises an OSError; `goes_on_in` is where it goes on when its reader is gone."""

    goes_on_in: Path | None = None

    def __init__(self, descriptor: int, encoding: str = "utf-8", errors: str = "backslashreplace") -> None:
        self._descriptor = descriptor
        self._is_lost = False
        raw = io.FileIO(descriptor, "w", closefd=False)
        super().__init__(io.BufferedWriter(raw), encoding, errors, line_buffering=True, write_through=False)

    def write(self, text: str) -> int:
        with suppress(OSError):
            try:
                return super().write(text)
            except OSError:
                self._lose()
                return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            try:
                super().flush()
            except OSError:
                self._lose()
                super().flush()

    def _lose(self) -> None:
        """Point the descriptor elsewhere, once: what is buffered goes there, too."""
        if self._is_lost or self._descriptor not in (1, 2):
            return
        self._is_lost = True
        target = self.goes_on_in or Path(os.devnull)
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError:
            descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self._descriptor)
        os.close(descriptor)
        name = {1: "standard output", 2: "standard error"}[self._descriptor]
        print(f"warning: {name} was closed; it goes on in {target}", file=sys.stderr, flush=True)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Of this process, unless something took its streams already."""
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout = LastingStream(1, sys.stdout.encoding)
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        sys.stderr = LastingStream(2, sys.stderr.encoding)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def go_on_in(file: Path) -> None:
    """From now on: where a stream goes on whose reader is gone."""
    LastingStream.goes_on_in = file
