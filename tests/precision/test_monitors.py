"""What a trainer measures of its own precision, against direct computation from gradients, operands and tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from drpo_megatron.objectives import build
from drpo_megatron.objectives.histograms import MU_EDGES, WEIGHT_EDGES, bin_names, weight_histograms
from drpo_megatron.precision.layers import parameter_class
from drpo_megatron.precision.quantize import FORMATS, fake_quantize
from tests.distributed import run_ranks
from tests.objectives.reference import make_inputs
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"num_ranks": 1},
    "tp2ep2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    "pp2": {"num_ranks": 2, "pipeline": 2},
    "dp2": {"num_ranks": 2},
}


def rollouts(rank: int, world_size: int, hf_path: str, parallel: dict[str, Any], recipe: str, every: int) -> Any:
    """Metrics of two rollouts, one optimiser step and one micro-batch each; the whole gradient of the first."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    section = {
        "optimizer_steps_per_rollout": 1,
        "max_tokens_per_micro_batch": 1024,
        "optimizer": {"clip_grad": 1e9},
    }
    precision = {"train": {"name": recipe}, "monitor": {"layers_every": every, "gradient_every": every}}
    trainer = Trainer(tiny_config(hf_path, parallel, trainer=section, precision=precision))
    first = trainer.train_step(random_samples(12)).metrics
    gradients = [parameter.main_grad.flatten().clone() for parameter in trainer.chunks[0].parameters()]
    return first, torch.cat(gradients), trainer.train_step(random_samples(12)).metrics


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tmp_path_factory.mktemp("moe"), tiny_moe_config(initializer_range=0.1)))


def several(rank: int, world_size: int, hf_path: str, calls: list[tuple[str, str, int]]) -> list[Any]:
    return [rollouts(rank, world_size, hf_path, LAYOUTS[layout], recipe, every) for layout, recipe, every in calls]


@pytest.fixture(scope="module")
def single(hf_path: str) -> Any:
    """In one process: (delayed scaling watched, and not; unquantised)."""
    calls = [("one", "fp8-delayed", 1), ("one", "fp8-delayed", 0), ("one", "bf16", 1)]
    return run_ranks(1, several, hf_path, calls, timeout_s=600)[0]


def test_monitors_change_nothing(single: Any) -> None:
    """Delayed scaling included, whose history two more passes would shift."""
    watched, plain, _ = single
    assert torch.equal(watched[1], plain[1])
    for some, others in ((watched[0], plain[0]), (watched[2], plain[2])):
        assert not any(name.startswith("precision/") for name in others)
        # Where no token is, a share is NaN.
        torch.testing.assert_close({name: some[name] for name in others}, others, rtol=0, atol=0, equal_nan=True)


def test_the_cosine_is_that_of_the_gradients_of_two_trainers(single: Any) -> None:
    (metrics, low, _), _, (_, high, _) = single
    expected = torch.nn.functional.cosine_similarity(low.double(), high.double(), dim=0).item()
    assert 0.5 < expected < 0.999
    # FP32 sums of 5e4 products err by sqrt(5e4) unit roundoffs, 1.3e-5: one sum and two roots of sums (measured: 1e-8).
    # This holds the formula, not each summand: a small parameter that is left out moves it by 1e-7.
    assert metrics["precision/gradient_cosine/all"] == pytest.approx(expected, rel=3e-5)
    for name in ("qkv", "expert_fc2", "router", "norm", "embedding", "head"):
        assert 0.3 < metrics[f"precision/gradient_cosine/{name}"] < 1
    assert 0 < metrics["precision/router_flips/mean"] < 0.5
    assert metrics["precision/layer_00/router_flips"] < metrics["precision/layer_03/router_flips"]


def test_every_quantised_layer_and_role_is_looked_into(single: Any) -> None:
    metrics, unquantised = single[0][0], single[2][0]
    for layer in range(4):
        for what in ("qkv", "proj", "expert_fc1", "expert_fc2"):
            # Rounding to m mantissa bits leaves about 6.02 (m + 1) + 5 dB: E4M3 and, for gradients, E5M2.
            for role, low, high in (("activation", 27, 35), ("weight", 27, 35), ("gradient", 21, 29)):
                assert low < metrics[f"precision/layer_{layer:02d}/{what}/{role}/sqnr_db"] < high
    amaxes = [value for name, value in metrics.items() if name.endswith("/weight/amax") and "layer_" in name]
    assert metrics["precision/weight/amax"] == max(amaxes)
    assert not any(name.startswith("precision/") for name in unquantised)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2ep2", "pp2", "dp2"])
def test_ranks_measure_what_one_process_measures(layout: str, hf_path: str) -> None:
    calls = [(layout, "mxfp8", 1), (layout, "bf16", 1)]
    one = run_ranks(1, several, hf_path, [("one", recipe, every) for _, recipe, every in calls], timeout_s=600)[0]
    ranks = run_ranks(2, several, hf_path, calls, timeout_s=600)
    for quantised, (expected, *_) in enumerate(one):
        for rank in ranks:
            metrics = rank[quantised][0]
            squares = [value**2 for name, value in metrics.items() if name.startswith("optim/grad_norm/")]
            # Measured: 4e-8. Without the smallest class, the router's, it is 6e-4.
            assert math.sqrt(sum(squares)) == pytest.approx(metrics["optim/grad_norm"], rel=1e-4)
            torch.testing.assert_close(metrics, ranks[0][quantised][0], rtol=0, atol=0, equal_nan=True)
            for name in metrics:
                if name.startswith("optim/grad_norm/") and quantised == 1:
                    # Measured: 1.2e-7. A gradient that is off by a hundredth is 1e-2.
                    assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name
            names = {name for name in metrics if name.startswith("precision/")}
            assert names == {name for name in expected if name.startswith("precision/")}
    assert ranks[0][0][0]["precision/gradient_cosine/all"] == pytest.approx(
        one[0][0]["precision/gradient_cosine/all"], abs=0.02
    )
    assert ranks[0][0][0]["precision/weight/sqnr_db"] == pytest.approx(one[0][0]["precision/weight/sqnr_db"], abs=0.5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.weight", "qkv"),
        ("decoder.layers.0.self_attention.in_proj.weight", "qkv"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "norm"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "norm"),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", "expert_fc1"),
        ("decoder.layers.0.mlp.experts.linear_fc2.weight3", "expert_fc2"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "fc1"),
        ("decoder.layers.0.mlp.router.weight", "router"),
        ("decoder.final_layernorm.weight", "norm"),
        ("decoder.layers.0.self_attention.A_log", "other"),
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "head"),
    ],
)
def test_every_parameter_has_a_class(name: str, expected: str) -> None:
    assert parameter_class(name) == expected


def test_operand_statistics_by_hand() -> None:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.layer_probe import operand_statistics

    # One scale of E5M2 numbers from an earlier amax of 1: 4 is cut to 1; 1e-11 falls below half of the smallest number.
    x = torch.tensor([[4.0, 1.0, -0.5, 1e-11, 0.0]])
    rounded = fake_quantize(x, FORMATS["e5m2"], amax=torch.tensor(1.0))
    found = {name: s.value() for name, s in operand_statistics(x, rounded, may_saturate=True).items()}
    assert found["amax"] == 4
    assert found["underflow_share"] == pytest.approx(1 / 4)
    assert found["saturated_share"] == pytest.approx(1 / 5)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10((16 + 1 + 0.25) / 9), rel=1e-6)


def test_histograms_equal_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    log_mu = -4 * torch.rand(4000, generator=generator)
    log_pi = (log_mu + 0.5 * torch.randn(4000, generator=generator)).clamp(max=0)
    advantages = torch.randn(4000, generator=generator)
    advantages[::5] = 0
    inputs = make_inputs(log_pi, log_mu, advantages)
    outputs = build({"name": "drpo", "delta": 0.15})(inputs)
    found = {name: statistic.value() for name, statistic in weight_histograms(inputs, outputs).items()}

    acts = advantages.numpy() != 0
    weight, mu, a = outputs.weight.numpy()[acts], log_mu.exp().numpy()[acts], advantages.numpy()[acts]
    shares = np.histogram(weight, bins=[-np.inf, *WEIGHT_EDGES, np.inf])[0] / acts.sum()
    names = [f"objective/weight_share/{name}" for name in bin_names(WEIGHT_EDGES)]
    assert [found[name] for name in names] == pytest.approx(shares)
    assert sum(value for name, value in found.items() if "/ratio_weight_share/" in name) == pytest.approx(1)
    edges = [0, *MU_EDGES, 1.1]
    for name, low, high in zip(bin_names(MU_EDGES), edges, edges[1:], strict=False):
        for sign, chosen in (("positive", a > 0), ("negative", a < 0)):
            inside = chosen & (mu >= low) & (mu < high)
            if inside.any():
                expected = (weight[inside] <= 0).mean()
                assert found[f"objective/stopped_share/{sign}/mu_{name}"] == pytest.approx(expected)
