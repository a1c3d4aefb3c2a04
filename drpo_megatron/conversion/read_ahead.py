"""The disk begins to read while Python still imports torch and Megatron, which takes several seconds."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import psutil

MAX_SHARE = 0.25
"""Of the free memory: the kernel keeps what was read there until it is asked for, or needs the room."""


def read_ahead(directory: Path) -> None:
    """Ask the kernel, from a thread of its own, for the first tensor files of a checkpoint. A hint: nothing can fail."""
    if hasattr(os, "posix_fadvise"):  # Linux
        threading.Thread(target=_ask, args=(directory,), daemon=True).start()


def _ask(directory: Path) -> None:
    left = int(MAX_SHARE * psutil.virtual_memory().available)
    files = [*directory.glob("*.safetensors"), *directory.glob("*.distcp")]
    for file in sorted(files, key=lambda path: (len(path.name), path.name)):  # __2_0.distcp before __10_0.distcp.
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return  # Whoever reads it says what is wrong.
        size = min(os.fstat(descriptor).st_size, left)
        os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
        os.close(descriptor)
        left -= size
        if not left:
            return
