"""Replayed routing: tokens go to the engine's experts in every layout, and the router still weighs them and learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from drpo_megatron.data.packing import split_optimizer_steps
from drpo_megatron.types import RoutedExperts, Sample
from tests.by_transformers import METRICS, by_trainer, exact_step, logprobs_all
from tests.distributed import run_ranks
from tests.float64 import Exact
from tests.tiny import plain_model, random_samples, save_checkpoint, tiny_config, tiny_moe_config, tiny_qwen3_5_config
from tests.trainer.test_parity import assert_same

MOE_LAYERS, NUM_EXPERTS, K = (0, 2, 3), 4, 2
"""Of the Qwen3-MoE below: layer 1 is dense."""
FULL = {"recompute": "full"}
# Micro-batches of 40 tokens: several wait for their backward pass at once in a pipeline.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2ep2": ({"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}, {}),
    "ep2": ({"num_ranks": 2, "expert": 2}, FULL),
    "pp2": ({"num_ranks": 2, "pipeline": 2}, FULL),
    "vpp2pp2": ({"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2}, FULL),
    "cp2": ({"num_ranks": 2, "context": 2}, FULL),
    "tp2cp2": ({"num_ranks": 4, "tensor": 2, "sequence": True, "context": 2}, FULL),
}


def traced_samples(seed: int = 0, num_layers: int = len(MOE_LAYERS)) -> list[Sample]:
    """Random experts for every token: never what the routers would choose everywhere."""
    rng = np.random.default_rng(seed)

    def trace(sample: Sample) -> RoutedExperts:
        shape = (sample.num_tokens - 1, num_layers, NUM_EXPERTS)
        return RoutedExperts.of(rng.random(shape).argsort(-1)[..., :K])

    return [replace(sample, routed_experts=trace(sample)) for sample in random_samples(12)]


def one_step(
    hf_path: Path, samples: list[Sample], mode: str, parallel: dict[str, Any], model: dict[str, Any], updates: int = 1
) -> tuple[Any, dict[str, float], dict[str, torch.Tensor]]:
    """Log-probs before, metrics and the last gradient of every HF tensor of one rollout. Gradients on rank 0 only."""
    from drpo_megatron.trainer.trainer import Trainer

    section = {
        "routing_replay": mode,
        "optimizer_steps_per_rollout": updates,
        "max_tokens_per_micro_batch": 40,
        "optimizer": {"lr": 1e-3, "distributed": False, "clip_grad": 1e9},
    }
    trainer = Trainer(tiny_config(hf_path, parallel, model=model, trainer=section))
    logprobs = trainer.compute_logprobs(samples)
    metrics = trainer.train_step(samples).metrics
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return logprobs, metrics, {name: x.clone() for name, x in trainer.export_weights() if x is not None}


def steps(rank: int, world_size: int, root: Path, names: tuple[str, ...]) -> dict[str, Any]:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    return {name: one_step(root / "moe", traced_samples(), "rollout", *CASES[name]) for name in names}


def alone(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    samples = traced_samples()
    found: dict[str, Any] = {
        "replayed": one_step(root / "moe", samples, "rollout", {}, {}),
        "recomputed": one_step(root / "moe", samples, "rollout", {}, FULL),
        "measured": one_step(root / "moe", samples, "measure", {}, {}),
        "other_trace": one_step(root / "moe", traced_samples(seed=1), "rollout", {}, {}),
        "two_updates": one_step(root / "moe", samples, "rollout", {}, {}, updates=2),
        "untraced": one_step(root / "moe", random_samples(12), "off", {}, {}),
        "hybrid": one_step(root / "hybrid", traced_samples(num_layers=4), "rollout", {}, {}),
    }
    with pytest.raises(ValueError, match="sample p0/0 has no routed experts") as missing:
        one_step(root / "moe", random_samples(12), "rollout", {}, {})
    found["missing"] = str(missing.value)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_checkpoint(root / "moe", tiny_moe_config(mlp_only_layers=[1]))
    save_checkpoint(root / "hybrid", tiny_qwen3_5_config())
    return root


@pytest.fixture(scope="module")
def single(root: Path) -> dict[str, Any]:
    return run_ranks(1, alone, root, timeout_s=1200)[0]


class Forced:
    """A transformers model whose routers take the traces of samples, weighing by their own probabilities."""

    def __init__(self, hf_path: Path) -> None:
        self.model = plain_model(hf_path)
        self.traces: torch.Tensor | None = None
        self.own: list[torch.Tensor] = []
        routers = [module for module in self.model.modules() if type(module).__name__.endswith("TopKRouter")]
        for index, router in enumerate(routers):
            router.register_forward_hook(lambda _, __, output, index=index: self.route(index, *output))

    def route(self, index: int, logits: torch.Tensor, scores: torch.Tensor, own: torch.Tensor) -> Any:
        self.own.append(own)
        if self.traces is None:
            return None
        trace = self.traces[:, index]
        ids = torch.where(trace < 0, own, trace)
        probabilities = logits.softmax(-1).gather(1, ids)
        return logits, probabilities / probabilities.sum(-1, keepdim=True), ids

    def follow(self, samples: list[Sample]) -> Forced:
        """The rows of a batch, one after the other. The last token of a sample and its padding have no trace."""
        ids = [torch.tensor(sample.routed_experts.ids().astype(np.int64)) for sample in samples]
        longest = max(sample.num_tokens for sample in samples)
        padded = [F.pad(trace, (0, 0, 0, 0, 0, longest - len(trace)), value=-1) for trace in ids]
        self.traces = torch.cat(padded)
        return self


@pytest.fixture(scope="module")
def replayed(root: Path) -> Exact:
    """A step of the Qwen3-MoE with its routers forced."""
    samples = traced_samples()
    return exact_step(Forced(root / "moe").follow(samples).model, samples)


def test_replay_is_transformers_with_its_routers_forced(replayed: Exact, single: dict[str, Any]) -> None:
    """Log-probs, loss, and the gradients, also those of the routers: the probabilities are their own."""
    assert_same(single["replayed"], replayed)
    assert replayed.outside(by_trainer(*single["other_trace"])).keys() >= set(METRICS)


def test_replay_reaches_the_experts_of_hybrid_models(root: Path, single: dict[str, Any]) -> None:
    samples = traced_samples(num_layers=4)
    hybrid = exact_step(Forced(root / "hybrid").follow(samples).model, samples)
    mine = by_trainer(*single["hybrid"])
    # The published layout stacks experts, transformers saves one by one.
    assert all(".mlp.experts." in name for name in hybrid.values.keys() ^ mine.keys())
    assert hybrid.outside({name: mine[name] for name in hybrid.values.keys() & mine.keys()}) == {}
    assert single["hybrid"][1]["mismatch/router_flips/share"] == 0


def test_flips_are_counted_token_by_token_and_layer_by_layer(root: Path, single: dict[str, Any]) -> None:
    """Against transformers' own choices, unforced for `measure`, and after the forced ones of lower layers for replay."""
    forced, samples = Forced(root / "moe"), traced_samples()
    for replay, name, metric in ((False, "measured", "router_flips"), (True, "replayed", "router_overruled")):
        trace = forced.follow(samples).traces
        if not replay:
            forced.traces = None
        forced.own = []
        with torch.no_grad():
            logprobs_all(forced.model, samples)
        own, is_traced = torch.stack(forced.own, dim=1).sort(-1).values, trace[:, 0, 0] >= 0
        flips = (own != trace.sort(-1).values).any(-1)[is_traced].double().mean().item()
        assert 0.5 < flips < 1
        assert single[name][1][f"mismatch/{metric}/share"] == pytest.approx(flips, abs=1e-9)
    assert single["replayed"][1]["mismatch/router_flips/share"] == 0
    assert "mismatch/router_overruled/share" not in single["measured"][1]
    assert "mismatch/router_flips/share" not in single["untraced"][1]


def test_the_mismatch_is_that_before_the_first_update(single: dict[str, Any]) -> None:
    """In float64 from log-probs that were taken before it, over the sequences of the first optimiser step."""
    before, metrics, _ = single["two_updates"]
    first = split_optimizer_steps(traced_samples(), 2, seed=1)[0]
    log_pi = np.array([x for sample in first for x in before[sample.sample_id]], dtype=np.float64)
    log_mu = np.array([x for sample in first for x in sample.behavior_logprobs], dtype=np.float64)
    d, shift = log_pi - log_mu, np.abs(np.exp(log_pi) - np.exp(log_mu))
    expected = {
        "abs_prob_shift/mean": shift.mean(),
        "abs_prob_shift/p99": np.quantile(shift, 0.99, method="inverted_cdf"),
        "k1": -d.mean(),
        "k3": (np.exp(d) - 1 - d).mean(),
        "token_mult_prob_error": np.exp(np.abs(d)).mean(),
    }
    for name, number in expected.items():
        assert metrics[f"mismatch/{name}"] == pytest.approx(number, rel=5e-3 if "p99" in name else 1e-4), name
    assert metrics["shift/k1"] != metrics["mismatch/k1"], "the second update counts there, too"


def test_measuring_changes_nothing_and_another_trace_another_loss(single: dict[str, Any]) -> None:
    loss = {name: single[name][1]["objective/loss"] for name in ("replayed", "measured", "other_trace", "untraced")}
    assert loss["measured"] == loss["untraced"]
    assert single["measured"][0] == single["untraced"][0]
    assert abs(loss["replayed"] - loss["untraced"]) > 1e-3
    assert abs(loss["replayed"] - loss["other_trace"]) > 1e-3


def test_recomputation_replays_the_same_experts(single: dict[str, Any]) -> None:
    kept, recomputed = single["replayed"], single["recomputed"]
    assert recomputed[0] == kept[0]
    assert recomputed[1] == pytest.approx(kept[1], rel=1e-6, nan_ok=True)
    for name, gradient in kept[2].items():
        torch.testing.assert_close(recomputed[2][name], gradient, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    "names",
    [
        ("tp2ep2", "vpp2pp2", "cp2"),
        pytest.param(("ep2", "pp2"), marks=pytest.mark.slow),
        pytest.param(("tp2cp2",), marks=pytest.mark.slow),
    ],
)
def test_layouts_replay_like_transformers(
    names: tuple[str, ...], root: Path, single: dict[str, Any], replayed: Exact
) -> None:
    num_ranks = CASES[names[0]][0]["num_ranks"]
    ranks = run_ranks(num_ranks, steps, root, names, timeout_s=1200)
    for name in names:
        assert_same(ranks[0][name], replayed)
        for rank in ranks:
            metrics = rank[name][1]
            assert metrics["mismatch/router_flips/share"] == 0, name
            expected = single["replayed"][1]["mismatch/router_overruled/share"]
            assert metrics["mismatch/router_overruled/share"] == expected, name
