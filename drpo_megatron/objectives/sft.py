"""Weighted negative log-likelihood: the supervised warm-up through the same kernel."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import SFTConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import policy_outputs


def sft(inputs: ObjectiveInputs, config: SFTConfig) -> ObjectiveOutputs:
    """Negative log-likelihood, [T] in and out. Demonstrations carry A = 1; nobody reads their mu.

    loss = -A log pi,   coef = -A,   w = 1 (there is no ratio to weigh)
    """
    loss = -inputs.advantages * inputs.logprobs
    return policy_outputs(inputs, loss, torch.ones_like(loss), -inputs.advantages)
