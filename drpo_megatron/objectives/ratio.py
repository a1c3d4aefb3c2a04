"""The two numbers every objective is made of, r and pi - mu, written so that nothing overflows or becomes NaN."""

from __future__ import annotations

import torch

from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs

LOG_RATIO_LIMIT = 30.0
"""Whatever `log_ratio_max` says: r^2 stays below 1e27, so FP32 holds every product that an objective forms."""


def log_ratio(inputs: ObjectiveInputs) -> torch.Tensor:
    """min(log pi - log anchor, log_ratio_max), [T]."""
    return (inputs.logprobs - inputs.anchor_logprobs).clamp(max=min(inputs.log_ratio_max, LOG_RATIO_LIMIT))


def prob_shift(inputs: ObjectiveInputs) -> torch.Tensor:
    """pi - mu (mu: the anchor), [T]. Never mu (r - 1), which is 0 * inf for a rare token."""
    return inputs.logprobs.exp() - inputs.anchor_logprobs.exp()


def inverse_ratio(log_r: torch.Tensor, inputs: ObjectiveInputs) -> torch.Tensor:
    """1 / r, truncated like r itself. Only the reported w needs it: coefficients are written without a division."""
    return (-log_r).clamp(max=min(inputs.log_ratio_max, LOG_RATIO_LIMIT)).exp()


def policy_outputs(
    inputs: ObjectiveInputs, loss: torch.Tensor, weight: torch.Tensor, coef: torch.Tensor
) -> ObjectiveOutputs:
    """Outputs that are exactly 0 (and w = 1) where the advantage is 0, whatever the ratio is there."""
    acts = inputs.advantages != 0
    return ObjectiveOutputs(
        loss=torch.where(acts, loss, 0.0), coef=torch.where(acts, coef, 0.0), weight=torch.where(acts, weight, 1.0)
    )
