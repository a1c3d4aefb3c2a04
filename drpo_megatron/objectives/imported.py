"""A user's own objective by import path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from drpo_megatron.config.objective import ImportedObjectiveConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs

UserFunction = Callable[[ObjectiveInputs, dict[str, Any]], ObjectiveOutputs]


def load_function(path: str) -> UserFunction:
    """The function at `package.module:function`. Raises ValueError that says which half of the path is wrong."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"objective path={path!r}: module {module_name!r} cannot be imported ({error}); install it or put its "
            "folder on PYTHONPATH"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = ", ".join(sorted(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))))
        raise ValueError(f"objective path={path!r}: {module_name} has no callable {attribute!r}; it has: {names}")
    return function


def imported(inputs: ObjectiveInputs, config: ImportedObjectiveConfig, function: UserFunction) -> ObjectiveOutputs:
    """Call the user's function and refuse outputs that the kernel could not use."""
    outputs = function(inputs, dict(config.options))
    if not isinstance(outputs, ObjectiveOutputs):
        raise ValueError(f"objective {config.path} returned {type(outputs).__name__}; return an ObjectiveOutputs")
    for name in ("loss", "coef", "weight"):
        shape = tuple(getattr(outputs, name).shape)
        if shape != tuple(inputs.logprobs.shape):
            raise ValueError(
                f"objective {config.path} returned {name} of shape {shape}; it must be {tuple(inputs.logprobs.shape)}, "
                "one number a token"
            )
    return outputs
