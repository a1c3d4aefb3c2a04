"""GSPO: PPO's clip on one ratio a sequence."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import GSPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import LOG_RATIO_LIMIT, policy_outputs
from drpo_megatron.objectives.sequences import sequence_sums


def gspo(inputs: ObjectiveInputs, config: GSPOConfig) -> ObjectiveOutputs:
    """Group Sequence Policy Optimization, arXiv:2507.18071 Eq. 5-7. [T] in and out; needs sequence_ids.

        s_i    = exp(mean over the sequence's n_i live tokens of log r),   log s_i <= log_ratio_max
        loss_t = -min(s A, clip(s, 1 - eps_low, 1 + eps_high) A)
        coef_t = sum_u weights_u (-A_u s w_u) / (n_i weights_t) over the tokens u of the sequence,   w = 0 or 1

    Every token moves every loss of its sequence, hence the sum; with weights and advantages constant over a sequence
    coef_t = -A s w. The ratio of w is s here, not r. Paired with seq-mean-token-mean it is the paper's objective.
    """
    advantages, weights = inputs.advantages, inputs.weights
    log_r = inputs.logprobs - inputs.anchor_logprobs
    total, num_tokens = sequence_sums(inputs.sequence_ids, log_r, torch.ones_like(log_r))
    s = (total / num_tokens).clamp(max=min(inputs.log_ratio_max, LOG_RATIO_LIMIT)).exp()
    objective = torch.minimum(s * advantages, s.clamp(1 - config.eps_low, 1 + config.eps_high) * advantages)
    clipped = torch.where(advantages > 0, s > 1 + config.eps_high, s < 1 - config.eps_low)
    weight = (~clipped).to(s.dtype)
    (sequence_slope,) = sequence_sums(inputs.sequence_ids, -weights * advantages * s * weight)
    return policy_outputs(inputs, -objective, weight, sequence_slope / (num_tokens * weights))
