"""A user's own reward by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from drpo_megatron.types import Prompt

RewardFunction = Callable[[str, str, Prompt], float]
"""(response, answer, prompt) -> reward."""


def load_function(path: str) -> RewardFunction:
    """The function at `package.module:function`. Raises ValueError that says which half of the path is wrong."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"reward path={path!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"reward path={path!r}: module {module_name!r} cannot be imported ({error}); install it or put its folder "
            "on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"reward path={path!r}: {module_name} has no callable {attribute!r}")
    return function
