"""SAPO: a sigmoid gate on the ratio, smooth where PPO clips."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import SAPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio, policy_outputs


def sapo(inputs: ObjectiveInputs, config: SAPOConfig) -> ObjectiveOutputs:
    """Soft Adaptive Policy Optimization, arXiv:2511.20347. [T] in and out.

    loss = -A (4 / tau) sigmoid(tau (r - 1)),   tau = tau_pos where A > 0, else tau_neg
    coef = -A r w,   w = 4 p (1 - p) in [0, 1],   p = sigmoid(tau (r - 1))
    """
    advantages, r = inputs.advantages, log_ratio(inputs).exp()
    tau = torch.where(advantages > 0, config.tau_pos, config.tau_neg).to(r.dtype)
    gate = torch.sigmoid(tau * (r - 1))
    # sigmoid(-x), not 1 - sigmoid(x), which is 0 from x = 17 on in FP32.
    weight = 4 * gate * torch.sigmoid(-tau * (r - 1))
    return policy_outputs(inputs, -advantages * 4 / tau * gate, weight, -advantages * r * weight)
