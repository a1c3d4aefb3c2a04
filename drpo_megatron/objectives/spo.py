"""Simple Policy Optimization: a chi-squared penalty in place of PPO's clip."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import SPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio, policy_outputs


def spo(inputs: ObjectiveInputs, config: SPOConfig) -> ObjectiveOutputs:
    """SPO, arXiv:2401.16025. [T] in and out.

    loss = -A r + |A| (r - 1)^2 / (2 eps)
    coef = -A r w,   w = 1 - sign(A) (r - 1) / eps

    w has no lower bound: a rare token whose probability grows a hundredfold gets w = 1 - 99 / eps.
    """
    advantages, log_r = inputs.advantages, log_ratio(inputs)
    r, growth = log_r.exp(), torch.expm1(log_r)  # growth = r - 1 without the cancellation near r = 1
    loss = -advantages * r + advantages.abs() * growth.square() / (2 * config.eps)
    weight = 1 - advantages.sign() * growth / config.eps
    return policy_outputs(inputs, loss, weight, -advantages * r * weight)
