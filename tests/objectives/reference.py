"""The objectives as a paper prints them: r = pi / mu, a loss, and autograd in float64. No closed-form gradient here."""

from __future__ import annotations

from typing import Any

import torch

from drpo_megatron.objectives import ObjectiveInputs

PENALTIES = {
    "l2": lambda pi, mu: mu * (pi / mu - 1) ** 2 / 2,
    "kl": lambda pi, mu: pi / mu * (pi / mu).log() - pi / mu + 1,
    "k3": lambda pi, mu: pi / mu - 1 - (pi / mu).log(),
    "tv": lambda pi, mu: (pi / mu - 1).abs() / 2,
}


def plain_loss(name: str, pi: torch.Tensor, mu: torch.Tensor, a: torch.Tensor, c: dict[str, Any]) -> torch.Tensor:
    """Per-token loss of probabilities. Piecewise objectives detach their masks, as their papers do."""
    r = pi / mu
    if name == "pg":
        return -r * a
    if name in ("grpo", "ppo"):
        objective = torch.min(r * a, r.clamp(1 - c.get("eps_low", 0.2), 1 + c.get("eps_high", 0.28)) * a)
        if "dual_clip" in c:
            objective = torch.where(a < 0, torch.max(objective, c["dual_clip"] * a), objective)
        return -objective
    if name == "spo":
        return -(r * a - a.abs() / (2 * c.get("eps", 12.5)) * (r - 1) ** 2)
    if name == "dppo":
        if c.get("divergence", "binary_tv") == "binary_tv":
            divergence = (pi - mu).abs()
        else:
            divergence = mu * (mu / pi).log() + (1 - mu) * ((1 - mu) / (1 - pi)).log()
        away = ((a > 0) & (r > 1)) | ((a < 0) & (r < 1))
        return -(~(away & (divergence > c["delta"]))).double() * r * a
    if name == "drpo":
        penalty = PENALTIES[c.get("penalty", "l2")](pi, mu)
        if c.get("advantage_weighted", True):
            penalty = penalty * a.abs()
        if "delta_mask" in c:
            penalty = penalty * ((pi - mu).abs() > c["delta_mask"])
        return -r * a + penalty / c["delta"]
    if name == "cispo":
        return -r.clamp(1 - c.get("eps_low", 1.0), 1 + c.get("eps_high", 4.0)).detach() * a * pi.log()
    if name == "sapo":
        tau = torch.where(a > 0, c.get("tau_pos", 1.0), c.get("tau_neg", 1.05)).double()
        return -torch.sigmoid(tau * (r - 1)) * 4 / tau * a
    assert name == "sft"
    return -a * pi.log()


def grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log pi, log mu and A, float64 [T]: common and very rare tokens, each with advantages of both signs.

    Off the kinks (no pair has pi = mu, where TV has no derivative, or r at a clipping limit), and below log_ratio_max.
    """
    mu = torch.tensor([1e-8, 1e-6, 1e-3, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 0.9999], dtype=torch.float64)
    pi = torch.tensor([2e-8, 9e-7, 2e-3, 0.013, 0.113, 0.37, 0.52, 0.77, 0.96, 0.9998], dtype=torch.float64)
    a = torch.tensor([-1.7, -0.25, 0.5, 1.0], dtype=torch.float64)
    pi, mu, a = (t.reshape(-1) for t in torch.meshgrid(pi, mu, a, indexing="ij"))
    return pi.log(), mu.log(), a


def make_inputs(
    logprobs: torch.Tensor, behavior_logprobs: torch.Tensor, advantages: torch.Tensor, **more: Any
) -> ObjectiveInputs:
    more.setdefault("weights", torch.ones_like(logprobs))
    return ObjectiveInputs(
        logprobs=logprobs,
        behavior_logprobs=behavior_logprobs,
        advantages=advantages,
        anchor_logprobs=behavior_logprobs,
        **more,
    )
