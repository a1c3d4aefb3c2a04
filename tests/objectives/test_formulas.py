"""Every objective's closed-form coefficient against autograd of the plain formula, and DRPO's geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_megatron.objectives import build
from tests.objectives.reference import grid, make_inputs, plain_loss

CONFIGS: list[dict[str, Any]] = [
    {"name": "pg"},
    {"name": "grpo"},
    {"name": "ppo", "eps_low": 0.1, "eps_high": 0.1, "dual_clip": 3.0},
    {"name": "spo"},
    {"name": "spo", "eps": 0.2},
    {"name": "dppo", "delta": 0.15},
    {"name": "dppo", "delta": 0.05, "divergence": "binary_kl"},
    {"name": "drpo", "delta": 0.15},
    {"name": "drpo", "delta": 12.5},
    {"name": "drpo", "delta": 0.15, "advantage_weighted": False},
    {"name": "drpo", "delta": 0.15, "delta_mask": 0.1},
    {"name": "drpo", "delta": 0.5, "penalty": "kl"},
    {"name": "drpo", "delta": 0.5, "penalty": "k3", "advantage_weighted": False},
    {"name": "drpo", "delta": 0.5, "penalty": "tv"},
    {"name": "cispo"},
    {"name": "cispo", "eps_low": 0.3, "eps_high": 0.28},
    {"name": "sapo"},
    {"name": "sft"},
]
pytestmark = pytest.mark.filterwarnings("ignore:drpo with delta=12.5")


def _title(config: dict[str, Any]) -> str:
    return "-".join(str(v) for v in config.values())


def assert_same(
    got: torch.Tensor, expected: torch.Tensor, log_pi: torch.Tensor, log_mu: torch.Tensor, a: torch.Tensor
) -> None:
    """In FP64, up to its rounding: 1e-16, times the exponent (18 at most), times 1 / delta (20 at most), of |A| r and
    |A|, which may cancel in the sum. A factor of 25 is left; a wrong formula is off by 1e-2 of them at some token."""
    terms = a.abs() * ((log_pi - log_mu).exp() + 1) + expected.abs()
    assert ((got - expected).abs() <= 1e-12 * terms).all()


@pytest.mark.parametrize("config", CONFIGS, ids=_title)
def test_coefficient_is_autograd_of_the_plain_loss(config: dict[str, Any]) -> None:
    log_pi, log_mu, a = grid()
    log_pi.requires_grad_()
    expected_loss = plain_loss(config["name"], log_pi.exp(), log_mu.exp(), a, config)
    (expected_coef,) = torch.autograd.grad(expected_loss.sum(), log_pi)

    outputs = build(config)(make_inputs(log_pi.detach(), log_mu, a))

    assert_same(outputs.loss, expected_loss.detach(), log_pi, log_mu, a)
    assert_same(outputs.coef, expected_coef, log_pi, log_mu, a)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["name"] != "sft"], ids=_title)
def test_weight_is_what_multiplies_the_unregularised_gradient(config: dict[str, Any]) -> None:
    log_pi, log_mu, a = grid()
    outputs = build(config)(make_inputs(log_pi, log_mu, a))
    assert_same(outputs.coef, -a * (log_pi - log_mu).exp() * outputs.weight, log_pi, log_mu, a)


@pytest.mark.parametrize("config", CONFIGS, ids=_title)
def test_fp32_keeps_five_digits_of_the_float64_result(config: dict[str, Any]) -> None:
    log_pi, log_mu, a = (t.float() for t in grid())
    objective = build(config)
    single = objective(make_inputs(log_pi, log_mu, a))
    double = objective(make_inputs(log_pi.double(), log_mu.double(), a.double()))
    assert single.loss.dtype == single.coef.dtype == single.weight.dtype == torch.float32
    # A log-prob of -20 is itself only known to 1e-6, and pi - mu loses what pi and mu share: 1e-5 of |A| r / delta.
    scale = (a.abs() * (log_pi - log_mu).exp()).double() + a.abs().double()
    for name in ("loss", "coef"):
        error = (getattr(single, name).double() - getattr(double, name)).abs()
        assert (error <= 1e-5 * (scale + getattr(double, name).abs())).all(), name


probability = st.floats(1e-12, 1 - 1e-6)
advantage = st.floats(0.01, 10).flatmap(lambda a: st.sampled_from([a, -a]))


def _drpo(pi: float, mu: float, a: float, delta: float) -> tuple[float, float]:
    log_pi, log_mu, advantages = (torch.tensor([x], dtype=torch.float64) for x in (pi, mu, a))
    log_pi, log_mu = log_pi.log(), log_mu.log()
    outputs = build({"name": "drpo", "delta": delta})(make_inputs(log_pi, log_mu, advantages))
    return outputs.weight.item(), outputs.coef.item()


@settings(max_examples=200, deadline=None)
@given(pi=probability, mu=probability, a=advantage, delta=st.floats(0.05, 0.99))
def test_drpo_weight_has_the_papers_closed_form_and_bounds(pi: float, mu: float, a: float, delta: float) -> None:
    weight, _ = _drpo(pi, mu, a, delta)
    sign = (1 if a > 0 else -1) * (1 if pi > mu else -1 if pi < mu else 0)
    assert weight == pytest.approx(1 - sign * abs(pi - mu) / delta, rel=1e-9, abs=1e-9)
    assert 1 - 1 / delta - 1e-9 <= weight <= 1 + 1 / delta + 1e-9


@settings(max_examples=100, deadline=None)
@given(mu=st.floats(0.2, 0.8), a=advantage, delta=st.floats(0.01, 0.19))
def test_drpo_gradient_is_zero_at_the_boundary_and_turns_back_beyond_it(mu: float, a: float, delta: float) -> None:
    sign = 1 if a > 0 else -1
    weight, coef = _drpo(mu + sign * delta, mu, a, delta)
    assert abs(weight) < 1e-9 and abs(coef) < 1e-7
    # Descent on the loss raises log pi where coef < 0: toward sign(A) inside the boundary, against it outside.
    assert _drpo(mu + sign * delta * 0.99, mu, a, delta)[1] * sign < 0
    assert _drpo(mu + sign * delta * 1.01, mu, a, delta)[1] * sign > 0


def test_dppo_masks_exactly_where_drpo_changes_sign() -> None:
    log_pi, log_mu, a = grid()
    inputs = make_inputs(log_pi, log_mu, a)
    drpo, dppo = (build({"name": name, "delta": 0.15})(inputs).weight for name in ("drpo", "dppo"))
    assert (dppo == 0).any() and (dppo == 1).any()
    assert torch.equal(dppo == 0, drpo < 0)


def test_drpo_without_abs_advantage_and_with_a_mask_reduce_to_drpo_and_pg() -> None:
    log_pi, log_mu, a = grid()
    inputs = make_inputs(log_pi, log_mu, a.sign())
    plain = build({"name": "drpo", "delta": 0.15})(inputs)
    unweighted = build({"name": "drpo", "delta": 0.15, "advantage_weighted": False})(inputs)
    torch.testing.assert_close(unweighted.coef, plain.coef)  # |A| = 1 everywhere
    masked = build({"name": "drpo", "delta": 0.15, "delta_mask": 0.1})(inputs)
    outside = (log_pi.exp() - log_mu.exp()).abs() > 0.1
    pg = build({"name": "pg"})(inputs)
    assert torch.equal(masked.coef, torch.where(outside, plain.coef, pg.coef))


def test_grpo_clips_as_computed_by_hand() -> None:
    # r:            1.5   1.5   0.5   0.5   1.1   5.0
    # A:            +1    -1    +1    -1    +2    -1
    # -min(rA, cA): -1.28 +1.5  -0.5  +0.8  -2.2  +5.0   with c = clip(r, 0.8, 1.28)
    # d/dlog pi:    0     +1.5  -0.5  0     -2.2  +5.0
    r = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 5.0], dtype=torch.float64)
    a = torch.tensor([1.0, -1, 1, -1, 2, -1], dtype=torch.float64)
    log_mu = torch.full_like(r, -3.0)
    inputs = make_inputs(log_mu + r.log(), log_mu, a)
    outputs = build({"name": "grpo"})(inputs)
    assert outputs.loss.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -2.2, 5.0])
    assert outputs.coef.tolist() == pytest.approx([0, 1.5, -0.5, 0, -2.2, 5.0])
    assert outputs.weight.tolist() == [0, 1, 1, 0, 1, 1]
    dual = build({"name": "grpo", "dual_clip": 3.0})(inputs)  # the last token: loss 3, gradient 0
    assert dual.loss.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -2.2, 3.0])
    assert dual.weight.tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("divergence", ["topk_tv", "topk_kl"])
def test_dppo_topk_divergence_is_that_of_the_bucketed_distributions(divergence: str) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, num_topk, num_tokens = 50, 5, 400
    log_mu = (2 * torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(1)
    noise = torch.randn(num_tokens, vocabulary, generator=generator, dtype=torch.float64)
    log_pi = (log_mu + 0.5 * noise).log_softmax(1)
    sampled = torch.multinomial(log_mu.exp(), 1, generator=generator)
    top = log_mu.topk(num_topk, dim=1).indices
    a = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    delta = 0.1 if divergence == "topk_tv" else 0.03
    inputs = make_inputs(
        log_pi.gather(1, sampled)[:, 0],
        log_mu.gather(1, sampled)[:, 0],
        a,
        topk_logprobs=log_pi.gather(1, top),
        topk_behavior_logprobs=log_mu.gather(1, top),
    )
    weight = build({"name": "dppo", "divergence": divergence, "delta": delta, "num_topk": num_topk})(inputs).weight

    for t in range(num_tokens):
        kept = sorted(set(top[t].tolist()) | {int(sampled[t])})
        mu, pi = log_mu[t, kept].exp(), log_pi[t, kept].exp()
        mu, pi = torch.cat([mu, 1 - mu.sum(0, True)]), torch.cat([pi, 1 - pi.sum(0, True)])
        value = (mu - pi).abs().sum() / 2 if divergence == "topk_tv" else (mu * (mu / pi).log()).sum()
        away = a[t] * (log_pi[t, sampled[t, 0]] - log_mu[t, sampled[t, 0]]) > 0
        assert weight[t].item() == (0.0 if away and value > delta else 1.0)
    assert 0 < (weight == 0).sum() < num_tokens / 2
