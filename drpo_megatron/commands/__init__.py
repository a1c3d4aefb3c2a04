"""One module a command of `drpo-megatron`: `add` declares its options, its run function does it.

Modules import no torch at their top, so that help and bad input are answered at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn


class BadInput(Exception):
    """What the user gave can't be used. Exit code 2."""


class RunFailed(Exception):
    """The input was fine, the run was not. Exit code 1."""


class Stopped(Exception):
    """A signal ended the run, which can be continued. Exit code 75, the EX_TEMPFAIL of sysexits.h."""


class Unforeseen(Exception):
    """A defect of ours. `directory` is where its traceback should go, `advice` a line for the user."""

    def __init__(self, cause: Exception, directory: Path, advice: str) -> None:
        super().__init__(cause)
        self.cause, self.directory, self.advice = cause, directory, advice


class MachineLost(RunFailed):
    """A machine left the cluster: the run can be continued on others. Exit code 76."""


def raise_interrupt(signum: int, frame: Any) -> NoReturn:
    """A signal handler that makes the signal end the command as Ctrl-C does."""
    raise KeyboardInterrupt(signum)
