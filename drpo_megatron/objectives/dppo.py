"""DPPO: the surrogate with a mask that asks how far the *distribution* has moved, not the ratio."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import DPPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import log_ratio, policy_outputs, prob_shift

_LOG_ZERO = -100.0
"""Stands for log 0: its exponential is 0 in FP32, and 0 times it is 0 where 0 times -inf would be NaN."""
_SMALLEST_REST = 1e-7
"""Rounding of 1 - sum(top-k) in FP32; a rest bucket below it is noise."""


def dppo(inputs: ObjectiveInputs, config: DPPOConfig) -> ObjectiveOutputs:
    """DPPO, arXiv:2602.04879. [T] in and out; topk_* also reads the [T, K] top log-probs.

        loss = -M A r,   coef = -A r w,   w = M
        M = 0 where the update moves away (A > 0 and r > 1, or A < 0 and r < 1) and D > delta, else 1

    D is a divergence of pi from mu over buckets of the vocabulary: binary_*: {sampled token, all others}; topk_*: the
    engine's top k, the sampled token when it is not among them, and the rest. TV is sum |pi - mu| / 2, which for two
    buckets is |pi - mu|; KL is sum mu log(mu / pi). M is a constant of the gradient.
    """
    advantages, log_r = inputs.advantages, log_ratio(inputs)
    if config.divergence == "binary_tv":
        divergence = prob_shift(inputs).abs()
    elif config.divergence == "binary_kl":
        divergence = binary_kl(inputs.anchor_logprobs, inputs.logprobs)
    else:
        divergence = topk_divergence(inputs, kl=config.divergence == "topk_kl")
    masked = (advantages * log_r > 0) & (divergence > config.delta)
    weight = (~masked).to(log_r.dtype)
    coef = -advantages * log_r.exp() * weight
    return policy_outputs(inputs, coef, weight, coef)


def binary_kl(log_mu: torch.Tensor, log_pi: torch.Tensor) -> torch.Tensor:
    """mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi)), [T], finite also where a probability is 0 or 1."""
    other_mu, other_pi = _log_complement(log_mu), _log_complement(log_pi)
    return log_mu.exp() * (log_mu - log_pi) + other_mu.exp() * (other_mu - other_pi)


def _log_complement(logprobs: torch.Tensor) -> torch.Tensor:
    """log(1 - p) from log p."""
    return (-torch.expm1(logprobs.clamp(max=0))).log().clamp(min=_LOG_ZERO)


def topk_divergence(inputs: ObjectiveInputs, *, kl: bool) -> torch.Tensor:
    """TV or KL over the top-k buckets, [T]. Raises ValueError without the top-k log-probs."""
    if inputs.topk_logprobs is None or inputs.topk_behavior_logprobs is None:
        raise ValueError("divergence=topk_* needs topk_logprobs and topk_behavior_logprobs; the engine reported none")
    # No token outside the top k is as likely as the k-th: that is how a sampled token outside is known without ids.
    outside = inputs.behavior_logprobs < inputs.topk_behavior_logprobs.amin(dim=1)
    log_mu = _with_sampled(inputs.topk_behavior_logprobs, inputs.behavior_logprobs, outside)
    log_pi = _with_sampled(inputs.topk_logprobs, inputs.logprobs, outside)
    mu, pi = log_mu.exp(), log_pi.exp()
    rest_mu, rest_pi = ((1 - p.sum(dim=1)).clamp(min=_SMALLEST_REST) for p in (mu, pi))
    if kl:
        return (mu * (log_mu - log_pi)).sum(dim=1) + rest_mu * (rest_mu / rest_pi).log()
    return ((mu - pi).abs().sum(dim=1) + (rest_mu - rest_pi).abs()) / 2


def _with_sampled(topk: torch.Tensor, sampled: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """[T, K + 1]: the top-k log-probs and the sampled token's, or an empty bucket where it is among them."""
    last = torch.where(outside, sampled, _LOG_ZERO)
    return torch.cat([topk, last.unsqueeze(1)], dim=1).clamp(min=_LOG_ZERO)
