"""A user's own objective by import path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drpo_megatron import imported as by_path
from drpo_megatron.config.objective import ImportedObjectiveConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs

UserFunction = Callable[[ObjectiveInputs, dict[str, Any]], ObjectiveOutputs]
"""(inputs, options) -> outputs."""


def load_function(path: str) -> UserFunction:
    """The function at `package.module:function`. ValueError says in a line what is wrong with it."""
    return by_path.load_function("objective", path, by_path.OBJECTIVE_ARGUMENTS)


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
