"""The end of every error that no command foresaw: a line or two for the user, the traceback in a file.

Errors that are foreseen are `BadInput` and `RunFailed`, and say themselves what to do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from drpo_megatron import __version__

EXIT_INPUT, EXIT_FAILED, EXIT_DEFECT = 2, 1, 70
"""70 is EX_SOFTWARE of sysexits.h: the fault is this program's."""


def make_printable() -> None:
    """Characters that a terminal or a log can't show (LANG=C) are written as escapes instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Not what a test or a notebook puts in their place.
            stream.reconfigure(errors="backslashreplace")


def explained(error: BaseException) -> str:
    """The message of an error for people, without the ways in which libraries word theirs."""
    inner = error.args[0] if len(error.args) == 1 and isinstance(error.args[0], BaseException) else error
    return _known(inner)[0] or str(error) or type(error).__name__


def report(error: Exception, directories: tuple[Path, ...] = ()) -> int:
    """Say what happened, on stderr. Returns the exit code.

    Args:
        directories: where the traceback of a defect goes, the first that can be written to; then the current and the
            temporary directory. It is readable by the user alone: it may quote prompts and paths.
    """
    text, code = _known(error)
    if text is not None:
        print(f"error: {text}", file=sys.stderr)
        return code
    file = _save(error, (*directories, Path.cwd(), Path(tempfile.gettempdir())))
    summary = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(f"error: this should not have happened: {summary}", file=sys.stderr)
    where = f"the traceback is in {file}" if file else "and its traceback could be written nowhere"
    print(f"{where}; please report it, with the command", file=sys.stderr)
    return EXIT_DEFECT


def _known(error: BaseException) -> tuple[str | None, int]:
    """What the kind of an error says by itself, with its exit code. None: nothing that a user could act on."""
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
        )
        return f"{names or 'the system'}: {error.strerror}", EXIT_FAILED
    if isinstance(error, MemoryError):
        return f"this machine has not enough memory: {error or 'an allocation failed'}", EXIT_FAILED
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply, or refers to itself; flatten it", EXIT_INPUT
    if isinstance(error, json.JSONDecodeError):
        return f"a file is not JSON: {error}", EXIT_INPUT
    if isinstance(error, UnicodeError):
        return f"a text or a file is not UTF-8: {error}", EXIT_INPUT
    if type(error).__name__ == "ValidationError" and hasattr(error, "errors"):  # pydantic's, not imported for this
        parts = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        return f"a value can't be used: {'; '.join(parts[:5])}", EXIT_INPUT
    if any(kind.__module__.startswith("yaml") for kind in type(error).__mro__):
        return f"a file is not YAML: {' '.join(str(error).split())}", EXIT_INPUT
    return None, EXIT_DEFECT


def _save(error: BaseException, directories: tuple[Path, ...]) -> Path | None:
    head = f"drpo-megatron {__version__}, Python {sys.version.split()[0]}: {' '.join(sys.argv)}\n\n"
    text = head + "".join(traceback.format_exception(error))
    for directory in directories:
        file = directory / f"drpo-megatron-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
        except OSError:
            continue
        return file
    return None
