"""Unregularised, importance-weighted policy gradient: the surrogate that all the others restrain."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import PGConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio, policy_outputs


def pg(inputs: ObjectiveInputs, config: PGConfig) -> ObjectiveOutputs:
    """Policy gradient, [T] in and out.

    loss = -A r,   coef = -A r,   w = 1
    """
    loss = -inputs.advantages * log_ratio(inputs).exp()
    return policy_outputs(inputs, loss, torch.ones_like(loss), loss)
