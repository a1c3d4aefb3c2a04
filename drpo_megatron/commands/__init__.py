"""One module a command of `drpo-megatron`: `add` declares its options, its run function does it.

Modules import no torch at their top, so that help and bad input are answered at once.
"""

from __future__ import annotations


class BadInput(Exception):
    """What the user gave can't be used. Exit code 2."""


class RunFailed(Exception):
    """The input was fine, the run was not. Exit code 1."""
