"""The optional KL term to a frozen reference policy."""

from __future__ import annotations

from dataclasses import replace

import torch

from drpo_megatron.config.objective import KLReferenceConfig
from drpo_megatron.objectives.base import ObjectiveInputs, ObjectiveOutputs
from drpo_megatron.objectives.ratio import LOG_RATIO_LIMIT


def add_kl(outputs: ObjectiveOutputs, inputs: ObjectiveInputs, config: KLReferenceConfig) -> ObjectiveOutputs:
    """Add coef * k to the loss, at every token. Schulman's estimators (joschu.net/blog/kl-approx.html), d = log pi/ref:

        k1 = d               k1' = 1
        k2 = d^2 / 2         k2' = d
        k3 = e^-d - 1 + d    k3' = 1 - e^-d     (e^-d truncated like r)

    On tokens drawn from pi, E[k2' grad log pi] is the gradient of KL(pi || ref); E[k1' grad log pi] is 0, and that of
    k3 belongs to KL(ref || pi). Not importance-weighted. Raises ValueError without reference_logprobs.
    """
    if inputs.reference_logprobs is None:
        raise ValueError(f"kl_ref (estimator {config.estimator}) needs reference_logprobs; none were given")
    d = inputs.logprobs - inputs.reference_logprobs
    if config.estimator == "k1":
        value, slope = d, d.new_ones(d.shape)
    elif config.estimator == "k2":
        value, slope = d.square() / 2, d
    else:
        inverse_growth = torch.expm1((-d).clamp(max=min(inputs.log_ratio_max, LOG_RATIO_LIMIT)))
        value, slope = inverse_growth + d, -inverse_growth
    return replace(outputs, loss=outputs.loss + config.coef * value, coef=outputs.coef + config.coef * slope)
