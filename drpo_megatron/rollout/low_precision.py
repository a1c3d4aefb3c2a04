"""An embedded engine that computes as one in FP8 would: what its linear layers read is rounded before they multiply.

Weights arrive rounded (`weight_sync`); here it is the activations, in the layers whose weights are quantised. Rounding
is part of the policy that the engine draws from: the reported mu includes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drpo_megatron.precision.rollout import RolloutPrecision


class RoundedActivations:
    """Hooks in a transformers model, which can be switched off."""

    def __init__(self, model: Any, slots: Mapping[str, torch.Tensor], precision: RolloutPrecision) -> None:
        """`slots`: checkpoint name -> the part of the model's memory that holds it."""
        self.precision = precision
        self.is_on = True
        starts = {slots[name].data_ptr() for name in precision.names if name in slots}
        self.layers = [
            name
            for name, module in model.named_modules()
            if any(parameter.data_ptr() in starts for parameter in module.parameters(recurse=False))
        ]
        """Names of the modules whose inputs are rounded."""
        for name in self.layers:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._round_input)
            if not isinstance(module, torch.nn.Linear):
                self._round_between(module)
        if any(not isinstance(model.get_submodule(name), torch.nn.Linear) for name in self.layers):
            model.set_experts_implementation("grouped_mm")  # The one that calls `_apply_gate`.

    def _round_input(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._rounded(inputs[0]), *inputs[1:])

    def _round_between(self, experts: Any) -> None:
        """What a layer's experts read is rounded by the hook; what their second matrices read, behind the gate here."""
        gate = experts._apply_gate
        experts._apply_gate = lambda gate_up: self._rounded(gate(gate_up))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return self.precision.rounded_activation(x) if self.is_on else x
