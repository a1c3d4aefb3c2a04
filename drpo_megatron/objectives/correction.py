"""Truncated importance correction of what `anchor: recompute` does not see: the engine's pi_old / mu.

A correction multiplies loss, coefficient and w of any objective by one constant c a token.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from drpo_megatron.config.objective import IcePopConfig, TISSequenceConfig, TISTokenConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import LOG_RATIO_LIMIT
from drpo_megatron.objectives.sequences import sequence_sums

Correction = TISTokenConfig | TISSequenceConfig | IcePopConfig


def correction_factor(inputs: ObjectiveInputs, config: Correction) -> torch.Tensor:
    """c, [T], of rho = pi_old / mu. Raises ValueError without old_logprobs (or without sequence_ids, tis_sequence).

    tis_token     min(rho_t, max_ratio)                    Yao et al. 2025, fengyao.notion.site/off-policy-rl
    tis_sequence  min(product of rho over the sequence, max_ratio)
    icepop        rho_t inside [min_ratio, max_ratio], else 0   Ring-1T, arXiv:2510.18855
    """
    if inputs.old_logprobs is None:
        raise ValueError(f"correction={config.name} needs old_logprobs; none were given")
    log_rho = inputs.old_logprobs - inputs.behavior_logprobs
    if isinstance(config, TISSequenceConfig):
        (log_rho,) = sequence_sums(inputs.sequence_ids, log_rho)
    rho = log_rho.clamp(max=LOG_RATIO_LIMIT).exp()
    if isinstance(config, IcePopConfig):
        return torch.where((rho >= config.min_ratio) & (rho <= config.max_ratio), rho, 0.0)
    return rho.clamp(max=config.max_ratio)


def apply_correction(outputs: ObjectiveOutputs, inputs: ObjectiveInputs, config: Correction) -> ObjectiveOutputs:
    factor = correction_factor(inputs, config)
    weight = torch.where(inputs.advantages != 0, outputs.weight * factor, outputs.weight)
    return replace(outputs, loss=outputs.loss * factor, coef=outputs.coef * factor, weight=weight)
