"""PPO's clipped surrogate as GRPO and DAPO use it."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import GRPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio, policy_outputs


def grpo(inputs: ObjectiveInputs, config: GRPOConfig) -> ObjectiveOutputs:
    """PPO clip (arXiv:1707.06347 Eq. 7), clip-higher (DAPO, arXiv:2503.14476), dual clip (arXiv:1912.09729). [T].

    loss = -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),   with a dual clip and A < 0 at most -dual_clip A
    coef = -A r w,   w = 0 where clipped, else 1
    """
    advantages, r = inputs.advantages, log_ratio(inputs).exp()
    clipped_r = r.clamp(1 - config.eps_low, 1 + config.eps_high)
    objective = torch.minimum(r * advantages, clipped_r * advantages)
    clipped = torch.where(advantages > 0, r > 1 + config.eps_high, r < 1 - config.eps_low)
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
        clipped = clipped | ((advantages < 0) & (r > config.dual_clip))
    weight = (~clipped).to(r.dtype)
    return policy_outputs(inputs, -objective, weight, -advantages * r * weight)
