"""Output directories that are whole or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drpo_megatron.files import (
    DISK_FULL,
    CannotWrite,
    explained,
    flush_tree,
    lock,
    put_in_place,
    remove_remains,
    require_free_space,
    scratch_name,
)


@contextmanager
def new_directory(
    target: str | Path, *, num_bytes: int = 0, force: bool = False, source: Path | None = None
) -> Iterator[Path]:
    """A directory to fill. It becomes `target` when the block ends without error, and is removed when it doesn't.

    Everything in it is flushed to the disk before it is renamed (`drpo_megatron.files`).

    Args:
        num_bytes: what will be written. Checked against the free disk first.
        force: replace an existing target, which stays until the new one is whole.
        source: what is read for it. It may not be the target, or lie in it: it would be lost.

    Raises: ValueError if `target` exists (unless `force`) or holds `source`, or the disk is too small, with both numbers;
        CannotWrite, which names the target, when writing fails.
    """
    target = Path(target)
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{target} can't be written while {source} is read from it; choose another directory")
    if target.exists() and not force:
        raise ValueError(f"{target} already exists; choose another directory, or --force to replace it")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_remains(target)
    require_free_space(target.parent, num_bytes)
    with explained(target):
        scratch = scratch_name(target)
        scratch.mkdir()
        descriptor = os.open(scratch, os.O_RDONLY)
    try:
        lock(descriptor)
        yield scratch
        with explained(target):
            flush_tree(scratch)
            put_in_place(scratch, target)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL and not isinstance(error, CannotWrite):
            raise CannotWrite.because(target, error) from error
        raise
    finally:
        os.close(descriptor)
