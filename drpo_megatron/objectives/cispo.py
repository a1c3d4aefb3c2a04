"""CISPO: REINFORCE with a clipped, detached importance weight."""

from __future__ import annotations

from drpo_megatron.config.objective import CISPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import inverse_ratio, log_ratio, policy_outputs


def cispo(inputs: ObjectiveInputs, config: CISPOConfig) -> ObjectiveOutputs:
    """CISPO (MiniMax-M1), arXiv:2506.13585 Eq. 4-5. [T] in and out; sg stops the gradient.

        loss = -sg(c) A log pi,   c = clip(r, 1 - eps_low, 1 + eps_high)
        coef = -A c,   w = c / r

    The paper has no lower limit and does not print its eps_high; 4 is the low end of what ScaleRL (arXiv:2510.13786)
    found to work about equally well.
    """
    log_r = log_ratio(inputs)
    clipped = log_r.exp().clamp(1 - config.eps_low, 1 + config.eps_high)
    coef = -inputs.advantages * clipped
    return policy_outputs(inputs, coef * inputs.logprobs, clipped * inverse_ratio(log_r, inputs), coef)
