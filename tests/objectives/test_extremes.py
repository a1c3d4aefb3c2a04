"""No objective gives NaN or inf, whatever the log-probs, and A = 0 gives exactly nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drpo_megatron.objectives import build
from tests.objectives.reference import make_inputs
from tests.objectives.test_formulas import CONFIGS, _title

pytestmark = pytest.mark.filterwarnings("ignore:drpo with delta=12.5")

# log ratio far up and down, both probabilities underflowed, both certain, one certain
LOG_PI = torch.tensor([-1e-3, -1e4, -1e4, -1.1e4, -200.0, 0.0, 0.0, -50.0])
LOG_MU = torch.tensor([-1e4, -1e-3, -1.1e4, -1e4, -210.0, 0.0, -50.0, 0.0])
ALL_CONFIGS: list[dict[str, Any]] = [
    *CONFIGS,
    {"name": "gspo"},
    {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_token"}},
    {"name": "grpo", "anchor": "recompute", "correction": {"name": "tis_sequence"}},
    {"name": "drpo", "delta": 0.15, "anchor": "recompute", "correction": {"name": "icepop"}},
    *({"name": "pg", "kl_ref": {"coef": 0.1, "estimator": k}} for k in ("k1", "k2", "k3")),
    {"name": "dppo", "delta": 0.1, "divergence": "topk_tv", "num_topk": 2},
    {"name": "dppo", "delta": 0.1, "divergence": "topk_kl", "num_topk": 2},
]


def _inputs(advantage: float, log_ratio_max: float) -> Any:
    log_pi, log_mu = LOG_PI, LOG_MU
    topk = torch.stack([log_pi, log_mu], dim=1).flip(0)
    return make_inputs(
        log_pi,
        log_mu,
        torch.full_like(log_pi, advantage),
        old_logprobs=log_mu.flip(0).contiguous(),
        reference_logprobs=log_mu,
        sequence_ids=torch.arange(log_pi.numel()) // 3,
        topk_logprobs=topk,
        topk_behavior_logprobs=topk.flip(1),
        log_ratio_max=log_ratio_max,
    )


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=_title)
@pytest.mark.parametrize("log_ratio_max", [20.0, 1e6])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_outputs_are_finite_at_the_extremes(config: dict[str, Any], log_ratio_max: float, advantage: float) -> None:
    outputs = build(config)(_inputs(advantage, log_ratio_max))
    for name in ("loss", "coef", "weight"):
        assert torch.isfinite(getattr(outputs, name)).all(), (name, getattr(outputs, name))


@pytest.mark.parametrize("config", [c for c in ALL_CONFIGS if "kl_ref" not in c], ids=_title)
def test_zero_advantage_gives_exactly_zero(config: dict[str, Any]) -> None:
    outputs = build(config)(_inputs(0.0, 20.0))
    assert (outputs.loss == 0).all() and (outputs.coef == 0).all() and (outputs.weight == 1).all()


def test_zero_advantage_gives_zero_even_where_mu_is_nan() -> None:
    nan = torch.tensor([float("nan")])
    outputs = build({"name": "drpo", "delta": 0.15})(make_inputs(torch.tensor([-1.0]), nan, torch.zeros(1)))
    assert outputs.loss.item() == outputs.coef.item() == 0 and outputs.weight.item() == 1


def test_the_coefficient_uses_the_truncated_ratio() -> None:
    # log r = 9, truncated to 2: coef = -A e^2 for pg; drpo keeps its true shift e^-1 - e^-10 = 0.36783.
    log_pi, log_mu, a = torch.tensor([[-1.0], [-10.0], [2.0]], dtype=torch.float64)
    inputs = make_inputs(log_pi, log_mu, a, log_ratio_max=2.0)
    assert build({"name": "pg"})(inputs).coef.item() == pytest.approx(-2 * 7.38905609893)
    expected = -2 * 7.38905609893 * (1 - (0.36787944117 - 0.00004539993) / 0.5)
    assert build({"name": "drpo", "delta": 0.5})(inputs).coef.item() == pytest.approx(expected)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=_title)
def test_no_tokens_give_no_outputs(config: dict[str, Any]) -> None:
    none = torch.zeros(0)
    inputs = make_inputs(
        none,
        none,
        none,
        old_logprobs=none,
        reference_logprobs=none,
        sequence_ids=torch.zeros(0, dtype=torch.long),
        topk_logprobs=torch.zeros(0, 2),
        topk_behavior_logprobs=torch.zeros(0, 2),
    )
    outputs = build(config)(inputs)
    assert outputs.loss.shape == outputs.coef.shape == outputs.weight.shape == (0,)
