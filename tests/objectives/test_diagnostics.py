"""Policy statistics against direct numpy, over one batch and over the same batch in pieces."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from drpo_megatron.metrics import Statistic, merge_all
from drpo_megatron.objectives import ObjectiveInputs, ObjectiveOutputs, build
from drpo_megatron.objectives.diagnostics import policy_statistics
from tests.objectives.reference import make_inputs

DELTA = 0.15
DRPO = build({"name": "drpo", "delta": DELTA})


def _inputs(num_tokens: int, *, old: bool = False) -> ObjectiveInputs:
    generator = torch.Generator().manual_seed(0)
    log_mu = -3 * torch.rand(num_tokens, generator=generator)
    log_old = (log_mu + 0.05 * torch.randn(num_tokens, generator=generator)).clamp(max=0)
    log_pi = (log_old + 0.3 * torch.randn(num_tokens, generator=generator)).clamp(max=0)
    a = torch.randn(num_tokens, generator=generator)
    a[::4] = 0
    return make_inputs(log_pi, log_mu, a, old_logprobs=log_old if old else None)


def _values(inputs: ObjectiveInputs, outputs: ObjectiveOutputs | None = None) -> dict[str, float]:
    outputs = outputs or DRPO(inputs)
    statistics = policy_statistics(inputs=inputs, outputs=outputs, entropy=-inputs.logprobs, delta=DELTA)
    return {name: statistic.value() for name, statistic in statistics.items()}


def _numpy(log_p: torch.Tensor, log_q: torch.Tensor, group: str) -> dict[str, float]:
    p, q = np.exp(log_p.double().numpy()), np.exp(log_q.double().numpy())
    d, shift = np.log(p) - np.log(q), np.abs(p - q)
    return {
        f"{group}/abs_prob_shift/mean": shift.mean(),
        f"{group}/abs_prob_shift/max": shift.max(),
        f"{group}/k1": (np.log(q) - np.log(p)).mean(),
        f"{group}/k3": (p / q - 1 - d).mean(),
        f"{group}/chi2": ((p / q - 1) ** 2).mean(),
        f"{group}/token_mult_prob_error": np.exp(np.abs(d)).mean(),
        f"{group}/effective_sample_share": (p / q).sum() ** 2 / (len(p) * ((p / q) ** 2).sum()),
    }


def test_statistics_equal_numpy() -> None:
    inputs = _inputs(5000)
    values = _values(inputs)
    acts = inputs.advantages.numpy() != 0
    pi, mu = inputs.logprobs.double().exp().numpy(), inputs.behavior_logprobs.double().exp().numpy()
    shift = np.abs(pi - mu)
    weight = (1 - np.sign(inputs.advantages.numpy() * (pi - mu)) * shift / DELTA)[acts]
    expected = _numpy(inputs.logprobs, inputs.behavior_logprobs, "mismatch") | {
        "objective/weight/min": weight.min(),
        "objective/weight/mean": weight.mean(),
        "objective/weight/max": weight.max(),
        "objective/beyond_boundary_share": (weight < 0).mean(),
        "objective/outside_trust_region_share": (shift[acts] > DELTA).mean(),
        "objective/clipped_share": 0.0,
        "policy/ratio/min": (pi / mu).min(),
        "policy/ratio/mean": (pi / mu).mean(),
        "policy/ratio/max": (pi / mu).max(),
        "policy/entropy/mean": -inputs.logprobs.double().mean().item(),
    }
    assert 0 < expected["objective/beyond_boundary_share"] < expected["objective/outside_trust_region_share"]
    for name, number in expected.items():
        assert values.pop(name) == pytest.approx(number, rel=1e-4, abs=1e-7), name
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        quantile = np.quantile(shift, share, method="inverted_cdf")
        assert values.pop(f"mismatch/abs_prob_shift/{name}") == pytest.approx(quantile, rel=0.005)
    # tests/precision/test_monitors.py compares the histograms with numpy's.
    left = [name for name in values if not re.match("objective/(weight|ratio_weight|stopped)_share/", name)]
    assert not left, f"statistics without a reference: {left}"


def test_with_old_logprobs_mismatch_and_drift_are_told_apart() -> None:
    inputs = _inputs(5000, old=True)
    values = _values(inputs)
    assert inputs.old_logprobs is not None
    expected = _numpy(inputs.old_logprobs, inputs.behavior_logprobs, "mismatch")
    expected |= _numpy(inputs.logprobs, inputs.old_logprobs, "drift")
    for name, number in expected.items():
        assert values[name] == pytest.approx(number, rel=1e-4, abs=1e-7), name
    assert values["drift/k3"] > 5 * values["mismatch/k3"]  # 0.3 of noise against 0.05


def test_the_distance_to_the_reference_is_estimated_over_all_tokens() -> None:
    inputs = _inputs(5000)
    assert (inputs.advantages == 0).any()
    reference = inputs.logprobs - 0.3 * torch.randn(5000, generator=torch.Generator().manual_seed(1))
    values = _values(replace(inputs, reference_logprobs=reference))
    log_ratio = (inputs.logprobs.double() - reference.double()).numpy()
    assert values["policy/kl_ref/k1"] == pytest.approx(log_ratio.mean(), rel=1e-4)
    assert values["policy/kl_ref/k3"] == pytest.approx((np.exp(-log_ratio) - 1 + log_ratio).mean(), rel=1e-4)


def test_clipped_share_counts_tokens_without_a_gradient() -> None:
    inputs = _inputs(5000)
    outputs = build({"name": "grpo"})(inputs)
    acts = inputs.advantages != 0
    r = (inputs.logprobs - inputs.behavior_logprobs).exp()
    clipped = torch.where(inputs.advantages > 0, r > 1.28, r < 0.8)[acts].double().mean().item()
    assert 0.01 < clipped < 0.5
    assert _values(inputs, outputs)["objective/clipped_share"] == pytest.approx(clipped)


def _slice(inputs: ObjectiveInputs, part: slice) -> ObjectiveInputs:
    fields = ("logprobs", "behavior_logprobs", "advantages", "anchor_logprobs", "weights", "old_logprobs")
    return replace(inputs, **{name: getattr(inputs, name)[part] for name in fields})


def test_merged_micro_batches_equal_the_whole_batch_even_when_one_is_empty() -> None:
    whole = _inputs(3001, old=True)
    parts = [_slice(whole, part) for part in (slice(0, 0), slice(0, 7), slice(7, 2000), slice(2000, None))]

    def statistics(inputs: ObjectiveInputs) -> dict[str, Statistic]:
        return policy_statistics(inputs=inputs, outputs=DRPO(inputs), entropy=-inputs.logprobs, delta=DELTA)

    merged = merge_all(statistics(part) for part in parts)
    expected = statistics(whole)
    assert merged.keys() == expected.keys()
    for name, statistic in merged.items():
        assert statistic.value() == pytest.approx(expected[name].value(), rel=1e-9, nan_ok=True), name


def test_no_tokens_give_empty_statistics_of_the_same_names() -> None:
    empty, some = _values(_inputs(0)), _values(_inputs(10))
    assert empty.keys() == some.keys()
    assert all(math.isnan(number) for number in empty.values())


def test_absurd_tokens_give_finite_statistics() -> None:
    inputs = make_inputs(torch.tensor([-1e4, -1e-3]), torch.tensor([-1e-3, -1e4]), torch.tensor([1.0, -1.0]))
    # Of the bins of mu, those without a token are NaN.
    values = {name: value for name, value in _values(inputs).items() if not name.startswith("objective/stopped_share/")}
    assert values and all(math.isfinite(value) for value in values.values())
