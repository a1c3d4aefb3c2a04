"""Policy objectives: `build(config)` makes one; docs/objectives.md lists them with their equations."""

from drpo_megatron.objectives.base import Objective, ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.build import REGISTRY, ConfiguredObjective, build

__all__ = ["REGISTRY", "ConfiguredObjective", "Objective", "ObjectiveInputs", "ObjectiveOutputs", "build"]
