"""Sequence-level objectives, the importance corrections, the KL term and the choice of anchor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.objectives import build
from tests.objectives.reference import make_inputs

# Three sequences of 4, 1 and 3 tokens, interleaved, under ids that are neither sorted nor dense.
IDS = torch.tensor([7, 2, 7, 900, 2, 7, 2, 7])


def _batch(weights: torch.Tensor, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    log_pi, log_mu, log_old, log_ref = -3 * torch.rand(4, IDS.numel(), generator=generator, dtype=torch.float64)
    advantage_of = {7: 1.0, 2: -0.5, 900: 0.25}
    a = torch.tensor([advantage_of[i] for i in IDS.tolist()], dtype=torch.float64)
    return make_inputs(
        log_pi, log_mu, a, weights=weights, old_logprobs=log_old, reference_logprobs=log_ref, sequence_ids=IDS
    )


def _gspo_total(log_pi: torch.Tensor, inputs: Any, eps_low: float, eps_high: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in IDS.unique():
        of_i = inputs.sequence_ids == i
        s = (log_pi - inputs.behavior_logprobs)[of_i].mean().exp()
        a = inputs.advantages[of_i]
        loss = -torch.min(s * a, s.clamp(1 - eps_low, 1 + eps_high) * a)
        total = total + (inputs.weights[of_i] * loss).sum()
    return total


@pytest.mark.parametrize("uneven", [False, True], ids=["weights-of-a-sequence-equal", "weights-of-tokens-differ"])
@pytest.mark.parametrize("eps", [0.05, 5.0])
def test_gspo_coefficient_is_autograd_of_the_weighted_sum(uneven: bool, eps: float) -> None:
    weights = torch.rand(IDS.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    inputs = _batch(weights if uneven else torch.full_like(weights, 0.125))
    low, high = min(eps, 1.0), eps
    log_pi = inputs.logprobs.clone().requires_grad_()
    total = _gspo_total(log_pi, inputs, low, high)
    (expected,) = torch.autograd.grad(total, log_pi)

    outputs = build({"name": "gspo", "eps_low": low, "eps_high": high})(inputs)

    torch.testing.assert_close((inputs.weights * outputs.loss).sum(), total.detach())
    torch.testing.assert_close(inputs.weights * outputs.coef, expected)


def test_gspo_clips_a_sequence_as_a_whole() -> None:
    # Mean log r: (0.5 - 0.4) / 2 = 0.05 and (-0.3 + 0.2) / 2 = -0.05, so s = 1.05127 and 0.95123. With A = 1 only the
    # first is clipped, although its second token alone has r = 0.67.
    log_mu = torch.full((4,), -1.0)
    log_pi = log_mu + torch.tensor([0.5, -0.4, -0.3, 0.2])
    inputs = make_inputs(log_pi, log_mu, torch.ones(4), sequence_ids=torch.tensor([0, 0, 1, 1]))
    outputs = build({"name": "gspo", "eps_low": 0.04, "eps_high": 0.04})(inputs)
    assert outputs.weight.tolist() == [0, 0, 1, 1]
    assert outputs.loss.tolist() == pytest.approx([-1.04, -1.04, -0.951229, -0.951229], abs=1e-5)


def test_sequence_level_objectives_say_so_and_need_ids() -> None:
    inputs = _batch(torch.ones(IDS.numel(), dtype=torch.float64))
    sequence = {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_sequence"}}
    token = {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_token"}}
    assert build({"name": "gspo"}).sequence_level and build(sequence).sequence_level
    assert not build(token).sequence_level and not build({"name": "drpo", "delta": 0.15}).sequence_level
    without = make_inputs(
        inputs.logprobs, inputs.behavior_logprobs, inputs.advantages, old_logprobs=inputs.old_logprobs
    )
    for config in ({"name": "gspo"}, sequence):
        with pytest.raises(ValueError, match="needs sequence_ids"):
            build(config)(without)


@pytest.mark.parametrize("name", ["tis_token", "tis_sequence", "icepop"])
def test_correction_multiplies_loss_and_gradient_by_its_constant(name: str) -> None:
    inputs = _batch(torch.full((IDS.numel(),), 0.125, dtype=torch.float64), seed=3)
    rho = inputs.old_logprobs.exp() / inputs.behavior_logprobs.exp()
    if name == "tis_token":
        factor, constants = torch.tensor([min(x, 1.2) for x in rho.tolist()]), {"max_ratio": 1.2}
    elif name == "tis_sequence":
        products = {int(i): rho[inputs.sequence_ids == i].prod().item() for i in IDS.unique()}
        factor, constants = torch.tensor([min(products[i], 3.0) for i in IDS.tolist()]), {"max_ratio": 3.0}
    else:
        factor = torch.tensor([x if 0.4 <= x <= 2.5 else 0.0 for x in rho.tolist()])
        constants = {"min_ratio": 0.4, "max_ratio": 2.5}
    factor = factor.double()
    assert factor.unique().numel() > 1 and (factor != rho).any()
    plain = build({"name": "drpo", "delta": 0.15, "anchor": "recompute"})(inputs)
    config = {"name": "drpo", "delta": 0.15, "anchor": "recompute", "correction": {"name": name, **constants}}
    corrected = build(config)(inputs)
    for quantity in ("loss", "coef", "weight"):
        expected = getattr(plain, quantity) * factor
        torch.testing.assert_close(getattr(corrected, quantity), expected, rtol=1e-6, atol=0)


def test_anchor_chooses_the_denominator_of_the_ratio() -> None:
    inputs = _batch(torch.ones(IDS.numel(), dtype=torch.float64))
    rollout = build({"name": "pg"})
    recompute = build({"name": "pg", "anchor": "recompute"})
    assert not rollout.needs_old_logprobs and recompute.needs_old_logprobs
    r_mu = (inputs.logprobs - inputs.behavior_logprobs).exp()
    r_old = (inputs.logprobs - inputs.old_logprobs).exp()
    torch.testing.assert_close(rollout(inputs).loss, -inputs.advantages * r_mu)
    torch.testing.assert_close(recompute(inputs).loss, -inputs.advantages * r_old)
    with pytest.raises(ValueError, match="anchor=recompute needs old_logprobs"):
        recompute(make_inputs(inputs.logprobs, inputs.behavior_logprobs, inputs.advantages))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_term_is_autograd_of_schulmans_estimator_and_acts_where_the_advantage_is_zero(estimator: str) -> None:
    inputs = _batch(torch.ones(IDS.numel(), dtype=torch.float64))
    inputs.advantages[::2] = 0
    log_pi = inputs.logprobs.clone().requires_grad_()
    inverse = inputs.reference_logprobs.exp() / log_pi.exp()  # Schulman's r, the ratio ref / pi
    value = {"k1": -inverse.log(), "k2": inverse.log() ** 2 / 2, "k3": inverse - 1 - inverse.log()}[estimator]
    (slope,) = torch.autograd.grad(value.sum(), log_pi)
    plain = build({"name": "drpo", "delta": 0.15})(inputs)
    objective = build({"name": "drpo", "delta": 0.15, "kl_ref": {"coef": 0.3, "estimator": estimator}})
    assert objective.needs_reference_logprobs
    outputs = objective(inputs)
    torch.testing.assert_close(outputs.loss - plain.loss, 0.3 * value.detach())
    torch.testing.assert_close(outputs.coef - plain.coef, 0.3 * slope)
    assert torch.equal(outputs.weight, plain.weight)


def test_on_policy_only_the_k2_gradient_is_the_gradient_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_pi, log_ref = logits.log_softmax(0), reference.log_softmax(0)
    (kl_gradient,) = torch.autograd.grad((log_pi.exp() * (log_pi - log_ref)).sum(), logits, retain_graph=True)
    expected = {}
    for estimator in ("k1", "k2", "k3"):
        detached = log_pi.detach()
        inputs = make_inputs(detached, detached, torch.zeros(6, dtype=torch.float64), reference_logprobs=log_ref)
        coef = build({"name": "pg", "kl_ref": {"coef": 1.0, "estimator": estimator}})(inputs).coef
        (expected[estimator],) = torch.autograd.grad((detached.exp() * coef * log_pi).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected["k2"], kl_gradient)
    torch.testing.assert_close(expected["k1"], torch.zeros(6, dtype=torch.float64))
    assert (expected["k3"] - kl_gradient).abs().max() > 1e-2
