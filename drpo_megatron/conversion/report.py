"""How far a conversion has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drpo_megatron.checkpoint.checksums import require_undamaged

Advance = Callable[[int], None]
"""Called with the number of bytes that were done, from any thread."""

_CHANGED = "copy it again; or, if a file was changed on purpose, give --skip-checksums"


def check_files(megatron: Path, *, skip: bool) -> None:
    """ValueError, with names, when files of a Megatron checkpoint aren't what its checksums say, if it has any."""
    if not skip:
        require_undamaged(megatron, _CHANGED, lambda num_bytes: progress_bar("checksums", num_bytes))


@contextmanager
def progress_bar(title: str, num_bytes: int) -> Iterator[Advance]:
    """A bar on standard error with rate and time left; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=num_bytes)
        yield lambda done: bar.advance(task, done)
