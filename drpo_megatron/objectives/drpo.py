"""DRPO: a smooth, advantage-weighted penalty on the probability shift, and the paper's ablations of it."""

from __future__ import annotations

import torch

from drpo_megatron.config.objective import DRPOConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import inverse_ratio, log_ratio, policy_outputs, prob_shift


def drpo(inputs: ObjectiveInputs, config: DRPOConfig) -> ObjectiveOutputs:
    """DRPO, arXiv:2606.09821 Eq. 8. [T] in and out.

        loss = -A r + |A| (pi - mu)(r - 1) / (2 delta)
        coef = -A r w,   w = 1 - sign(A (r - 1)) |pi - mu| / delta   in [1 - 1/delta, 1 + 1/delta]

    mu (r - 1)^2 is written (pi - mu)(r - 1): where mu underflows and r is large the former is 0 * inf. One token's
    stationary point is pi = mu + sign(A) delta; beyond it w < 0 and the update leads back.

    In general loss = -A r + scale P / delta and coef = -A r + scale P' / delta, P' = dP / dlog pi, with scale = |A|
    (or 1: `advantage_weighted: false`, which still leaves tokens with A = 0 alone) and the P of `_penalty`, set to 0
    where |pi - mu| <= delta_mask (Mask-DRPO).
    """
    advantages, log_r, shift = inputs.advantages, log_ratio(inputs), prob_shift(inputs)
    r = log_r.exp()
    penalty, slope, relative_slope = _penalty(config.penalty, inputs, log_r, shift)
    scale = advantages.abs() if config.advantage_weighted else torch.ones_like(advantages)
    scale = scale / config.delta
    if config.delta_mask is not None:
        scale = torch.where(shift.abs() > config.delta_mask, scale, 0.0)
    # A / A^2 is sign(A) / |A|; policy_outputs takes care of A = 0.
    weight = 1 - scale * relative_slope / advantages
    return policy_outputs(inputs, -advantages * r + scale * penalty, weight, -advantages * r + scale * slope)


def _penalty(
    name: str, inputs: ObjectiveInputs, log_r: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P, P' = dP / dlog pi and P' / r, each [T]. In expectation over mu, P is the divergence that the name says.

    l2  (pi - mu)(r - 1) / 2      P' = r (pi - mu)        half of sum (pi - mu)^2: the paper's
    kl  r log r - (r - 1)         P' = r log r            KL(pi || mu)
    k3  (r - 1) - log r           P' = r - 1              KL(mu || pi), Schulman's k3
    tv  |r - 1| / 2               P' = r sign(r - 1) / 2  TV(pi, mu)

    The paper names the last three; that they take this per-token form, and delta as their scale, is our reading.
    """
    r, growth = log_r.exp(), torch.expm1(log_r)  # growth = r - 1 without the cancellation near r = 1
    if name == "l2":
        return shift * growth / 2, r * shift, shift
    if name == "kl":
        return r * log_r - growth, r * log_r, log_r
    if name == "k3":
        return growth - log_r, growth, 1 - inverse_ratio(log_r, inputs)
    return growth.abs() / 2, r * log_r.sign() / 2, log_r.sign() / 2
