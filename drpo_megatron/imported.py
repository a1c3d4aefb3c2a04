"""Functions of users by import path: what can be wrong with one, in a line, and found before any process of a run starts."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple


class Arguments(NamedTuple):
    """How a function of a user is called."""

    num_positional: int
    keywords: tuple[str, ...] = ()
    """Given by keyword to a function whose signature names them, and to no other."""
    may_be_async: bool = False


REWARD_ARGUMENTS = Arguments(3, ("num_tokens", "finish_reason", "metadata"), may_be_async=True)
"""(response, answer, prompt)."""
OBJECTIVE_ARGUMENTS = Arguments(2)
"""(inputs, options)."""
_TIMEOUT_S = 120.0
_CHECK = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from drpo_megatron.imported import Arguments, load_function
try:
    load_function(sys.argv[2], sys.argv[3], Arguments(*json.loads(sys.argv[4])))
    text = "ok"
except ValueError as error:
    text = str(error)
with open(sys.argv[5], "w", encoding="utf-8") as file:
    file.write(text)
"""


def load_function(key: str, path: str, arguments: Arguments) -> Callable[..., Any]:
    """The function at `package.module:function`, called later with `arguments`.

    Raises: ValueError, one line that begins with `key path=...`, for a path of another form, a module that can't be
        imported or whatever it raises, a name that it doesn't have, and what is no function of these arguments.
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
    if problem := _shape_problem(function, arguments):
        raise ValueError(f"{named}: {attribute} {problem}")
    return function


def asked_keywords(function: Callable[..., Any], arguments: Arguments) -> tuple[str, ...]:
    """Which of the keywords the signature names, after its positional arguments."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()  # Written in C: nothing is known.
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    names -= set(positional[: arguments.num_positional])
    return tuple(keyword for keyword in arguments.keywords if keyword in names)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call makes a coroutine: of `async def`, or an instance whose __call__ is."""
    return any(inspect.iscoroutinefunction(candidate) for candidate in _candidates(function))


def module_places() -> list[str]:
    """Where a process that imports a user's module has to look for it: as here, and in the working directory."""
    here = os.getcwd()
    return [*([] if here in sys.path else [here]), *(str(place) for place in sys.path if place)]


def check_function(key: str, path: str, arguments: Arguments) -> None:
    """`load_function` in a process of its own, since importing may take memory, print, hang or end the process."""
    if problem := _problem_of(key, path, arguments, tuple(module_places())):
        raise ValueError(problem)


@cache
def _problem_of(key: str, path: str, arguments: Arguments, places: tuple[str, ...]) -> str | None:
    """Once for all cells of a study."""
    with tempfile.TemporaryDirectory() as directory:
        answer, errors = Path(directory, "answer"), Path(directory, "errors")
        command = [sys.executable, "-c", _CHECK, json.dumps(places), key, path, json.dumps(arguments), str(answer)]
        with errors.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
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


def _candidates(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """It, and what is run when it is called."""
    inner = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return function, inner


def _shape_problem(function: Callable[..., Any], arguments: Arguments) -> str | None:
    if inspect.isclass(function):
        return "is a class; give a function, or an instance that can be called"
    if is_async(function) and not arguments.may_be_async:
        return "is async; give a plain function, which returns its result and not a coroutine"
    for candidate in _candidates(function):
        if inspect.isasyncgenfunction(candidate) or inspect.isgeneratorfunction(candidate):
            return "is a generator (it yields); give a function that returns"
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # Written in C: nothing is known.
    try:
        signature.bind(*range(arguments.num_positional), **dict.fromkeys(asked_keywords(function, arguments)))
    except TypeError as error:
        return f"is called with {arguments.num_positional} positional arguments, but is {signature} ({error})"
    return None


def _described(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
