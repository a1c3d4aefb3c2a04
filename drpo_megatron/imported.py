"""Functions of users by import path: what can be wrong with one, in a line, and found before any process of a run starts."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

REWARD_ARGUMENTS, OBJECTIVE_ARGUMENTS = 3, 2
"""(response, answer, prompt) and (inputs, options)."""
_TIMEOUT_S = 120.0
_CHECK = """\
import sys
from drpo_megatron.imported import load_function
try:
    load_function(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    text = "ok"
except ValueError as error:
    text = str(error)
with open(sys.argv[4], "w", encoding="utf-8") as file:
    file.write(text)
"""


def load_function(key: str, path: str, num_arguments: int) -> Callable[..., Any]:
    """The function at `package.module:function`, called later with so many positional arguments.

    Raises: ValueError, one line that begins with `key path=...`, for a path of another form, a module that can't be
        imported or whatever it raises, a name that it doesn't have, and what is no plain function of so many arguments.
    """
    named = f"{key} path={path!r}"
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{named} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{named}: module {module_name!r} cannot be imported ({error}); install it or put its folder on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # The module is the user's and does anything.
        raise ValueError(f"{named}: importing {module_name} fails with {_described(error)}; mend the module") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = ", ".join(sorted(n for n, value in vars(module).items() if not n.startswith("_") and callable(value)))
        raise ValueError(f"{named}: {module_name} has no callable {attribute!r}; it has: {names or 'none'}")
    if problem := _shape_problem(function, num_arguments):
        raise ValueError(f"{named}: {attribute} {problem}")
    return function


def check_function(key: str, path: str, num_arguments: int) -> None:
    """`load_function` in a process of its own, since importing may take memory, print, hang or end the process."""
    if problem := _problem_of(key, path, num_arguments, os.getcwd(), tuple(sys.path)):
        raise ValueError(problem)


@cache
def _problem_of(key: str, path: str, num_arguments: int, directory: str, places: tuple[str, ...]) -> str | None:
    """Once for all cells of a study."""
    with tempfile.TemporaryDirectory() as directory:
        answer, errors = Path(directory, "answer"), Path(directory, "errors")
        command = [sys.executable, "-c", _CHECK, key, path, str(num_arguments), str(answer)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([directory, *filter(None, places)])}
        with errors.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        try:
            process.wait(_TIMEOUT_S)
            how = f"ends the process with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            how = f"takes more than {_TIMEOUT_S:g} s"
        finally:
            _kill_group(process)
        text = answer.read_text(encoding="utf-8") if answer.is_file() else ""
        if text == "ok":
            return None
        printed = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f" ({printed[-1][:200]})" if printed else ""
        return text or f"{key} path={path!r}: importing {path.partition(':')[0]} {how}{last}; mend the module"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shape_problem(function: Callable[..., Any], num_arguments: int) -> str | None:
    if inspect.isclass(function):
        return "is a class; give a function, or an instance that can be called"
    inner = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    for candidate in (function, inner):
        if inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate):
            return "is async; give a plain function, which returns its result and not a coroutine"
        if inspect.isgeneratorfunction(candidate):
            return "is a generator (it yields); give a function that returns"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # Written in C: nothing is known.
    try:
        signature.bind(*range(num_arguments))
    except TypeError as error:
        return f"is called with {num_arguments} positional arguments, but is {signature} ({error})"
    return None


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
