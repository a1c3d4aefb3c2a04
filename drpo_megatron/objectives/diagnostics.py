"""What one step did to the policy, as mergeable statistics: weights, ratios, and how far engine and trainer differ.

    mismatch/*  the trainer's distribution against the engine's mu, before any update: pi_old against mu
    drift/*     what the optimiser steps on one rollout moved: pi against pi_old
Without old_logprobs the two cannot be told apart, and mismatch/* is their sum: pi against mu.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from drpo_megatron.metrics import Statistic
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.histograms import weight_histograms
from drpo_megatron.objectives.ratio import LOG_RATIO_LIMIT, log_ratio


def policy_statistics(
    *,
    inputs: ObjectiveInputs,
    outputs: ObjectiveOutputs,
    entropy: torch.Tensor | None = None,
    delta: float | None = None,
) -> dict[str, Statistic]:
    """Statistics of the live tokens of one micro-batch. No tokens give valid, empty statistics of the same names.

    `outputs` are the objective's for `inputs`; `entropy` is [T] in nats; `delta` is the objective's boundary of
    |pi - mu|, if it has one. `objective/*` speaks of tokens with an advantage other than 0 only, because the others
    have no update to weigh and kernels may skip them; all else speaks of all live tokens.

    Example:
        >>> policy_statistics(inputs=i, outputs=o, delta=0.15)["objective/beyond_boundary_share"].value()
        0.014
    """
    acts, weight = inputs.advantages != 0, outputs.weight
    statistics = {
        "objective/weight/min": Statistic.min(weight, acts),
        "objective/weight/mean": Statistic.mean(weight, acts),
        "objective/weight/max": Statistic.max(weight, acts),
        "objective/beyond_boundary_share": Statistic.mean(weight < 0, acts),
        "objective/clipped_share": Statistic.mean(weight == 0, acts),
    }
    if delta is not None:
        shift = inputs.logprobs.exp() - inputs.anchor_logprobs.exp()
        statistics["objective/outside_trust_region_share"] = Statistic.mean(shift.abs() > delta, acts)
    ratio = log_ratio(inputs).exp()
    statistics |= {
        "policy/ratio/min": Statistic.min(ratio),
        "policy/ratio/mean": Statistic.mean(ratio),
        "policy/ratio/max": Statistic.max(ratio),
    }
    if entropy is not None:
        statistics["policy/entropy/mean"] = Statistic.mean(entropy)
    if inputs.reference_logprobs is not None:
        d = inputs.logprobs.double() - inputs.reference_logprobs.double()
        statistics |= {
            "policy/kl_ref/k1": Statistic.mean(d),
            "policy/kl_ref/k3": Statistic.mean(torch.expm1((-d).clamp(max=LOG_RATIO_LIMIT)) + d),
        }
    trainer = inputs.logprobs
    if inputs.old_logprobs is not None:
        trainer = inputs.old_logprobs
        statistics |= _distance("drift", inputs.logprobs, inputs.old_logprobs)
    statistics |= weight_histograms(inputs, outputs)
    return statistics | _distance("mismatch", trainer, inputs.behavior_logprobs)


def _distance(group: str, logprobs: torch.Tensor, drawn_from: torch.Tensor) -> dict[str, Statistic]:
    """How far p = exp(logprobs) is from q = exp(drawn_from), by the tokens drawn from q. d = log p - log q, r = p / q.

    k1 and k3 estimate KL(q || p): -d and (r - 1) - d. chi2 estimates chi^2(p || q): (r - 1)^2. token_mult_prob_error is
    the mean of exp |d| (NeMo-RL's alarm; healthy below 1.05). effective_sample_share is (sum r)^2 / (N sum r^2).
    Exponentials are taken of |d| <= LOG_RATIO_LIMIT, so one absurd token shows as a huge number, not as inf.
    """
    shift = (logprobs.exp() - drawn_from.exp()).abs()
    d = logprobs.double() - drawn_from.double()
    growth = torch.expm1(d.clamp(max=LOG_RATIO_LIMIT))
    p50 = Statistic.of_quantile(shift, 0.5)
    return {
        f"{group}/abs_prob_shift/mean": Statistic.mean(shift),
        f"{group}/abs_prob_shift/p50": p50,
        f"{group}/abs_prob_shift/p99": replace(p50, quantile=0.99),
        f"{group}/abs_prob_shift/max": Statistic.max(shift),
        f"{group}/k1": Statistic.mean(-d),
        f"{group}/k3": Statistic.mean(growth - d),
        f"{group}/chi2": Statistic.mean(growth.square()),
        f"{group}/token_mult_prob_error": Statistic.mean(d.abs().clamp(max=LOG_RATIO_LIMIT).exp()),
        f"{group}/effective_sample_share": Statistic.effective_share(1 + growth),
    }
