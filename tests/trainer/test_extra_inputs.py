"""What an objective may ask for beside mu: a frozen reference policy's log-probs, and the engine's top tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_megatron.types import Sample
from tests.distributed import run_ranks
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

DELTA, K, COEF = 0.15, 5, 0.5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2ep2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    "dp2": {"num_ranks": 2},
    "pp2cp2": {"num_ranks": 4, "pipeline": 2, "context": 2},
}
WARMUP = {"data": "unused.jsonl", "num_steps": 2, "sequences_per_step": 8, "optimizer": {"lr": 1e-2}}


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("moe"), tiny_moe_config())


@pytest.fixture(scope="module")
def samples(hf_path: Path) -> list[Sample]:
    """mu is the checkpoint's own distribution, flattened: far from pi, but not everywhere."""
    model = AutoModelForCausalLM.from_pretrained(hf_path)
    return [with_mu(sample, response_logprobs(model, sample, temperature=2.0)) for sample in random_samples(12)]


def response_logprobs(model: torch.nn.Module, sample: Sample, temperature: float = 1.0) -> torch.Tensor:
    """[response tokens, V]"""
    with torch.no_grad():
        logits = model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]])).logits[0]
    return (logits[len(sample.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)


def with_mu(sample: Sample, log_mu: torch.Tensor) -> Sample:
    top = log_mu.topk(K)
    return replace(
        sample,
        behavior_logprobs=tuple(log_mu.gather(1, torch.tensor(sample.response_ids)[:, None]).squeeze(1).tolist()),
        topk_ids=tuple(map(tuple, top.indices.tolist())),
        topk_behavior_logprobs=tuple(map(tuple, top.values.tolist())),
    )


def with_reference(samples: list[Sample], logprobs: dict[str, tuple[float, ...]]) -> list[Sample]:
    return [replace(sample, reference_logprobs=logprobs[sample.sample_id]) for sample in samples]


def train(
    rank: int, world_size: int, hf_path: str, parallel: dict[str, Any], sections: dict[str, Any], samples: list[Sample]
) -> dict[str, Any]:
    """Two optimiser steps, a checkpoint, a third step; then the third step again in a trainer that resumes."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint.hf import write_hf_checkpoint
    from drpo_megatron.trainer.trainer import Trainer

    config = tiny_config(
        hf_path,
        parallel,
        objective={
            "name": "dppo",
            "divergence": "topk_tv",
            "delta": DELTA,
            "num_topk": K,
            "kl_ref": {"coef": COEF},
        },
        trainer={"optimizer_steps_per_rollout": 1, "loss_low_memory": True, "optimizer": {"lr": 2e-3}},
        **sections,
    )
    found: dict[str, Any] = {}
    trainer = Trainer(config)
    reference_path = Path(hf_path).parent / f"reference-{parallel}"
    if config.warmup is not None:
        trainer.supervised_step(random_samples(8, seed=3))
        trainer.start_rl()
        exported = trainer.export_weights()
        if rank == 0:
            write_hf_checkpoint(reference_path, exported, hf_path)
        else:
            list(exported)
    found["initial"] = trainer.compute_logprobs(samples)
    samples = with_reference(samples, trainer.compute_reference_logprobs(samples))
    found["first_step"] = trainer.train_step(samples).metrics
    trainer.train_step(samples[:1])  # Fewer samples than data-parallel ranks.
    found["policy"] = trainer.compute_logprobs(samples)
    found["reference"] = trainer.compute_reference_logprobs(samples)
    found["policy_afterwards"] = trainer.compute_logprobs(samples)
    checkpoint = Path(hf_path).parent / f"checkpoint-{parallel}"
    trainer.save_checkpoint(checkpoint)
    found["third_step"] = trainer.train_step(samples).metrics
    found["weights"] = {name: tensor for name, tensor in trainer.export_weights() if tensor is not None}

    resumed = Trainer(config)
    if config.warmup is not None:
        resumed.load_reference(reference_path)
    resumed.load_checkpoint(checkpoint)
    found["resumed_reference"] = resumed.compute_reference_logprobs(samples)
    found["resumed_third_step"] = resumed.train_step(samples).metrics
    found["resumed_weights"] = {name: tensor for name, tensor in resumed.export_weights() if tensor is not None}
    return found


@pytest.fixture(scope="module", params=["tp2ep2", "dp2", pytest.param("pp2cp2", marks=pytest.mark.slow)])
def found(request: pytest.FixtureRequest, hf_path: Path, samples: list[Sample]) -> dict[str, Any]:
    parallel = LAYOUTS[request.param]
    sections = {"warmup": WARMUP} if request.param == "tp2ep2" else {}
    ranks = run_ranks(parallel["num_ranks"], train, str(hf_path), parallel, sections, samples, timeout_s=300)
    assert all(rank["reference"] == ranks[0]["reference"] for rank in ranks)
    return ranks[0] | {"warmed_up": bool(sections)}


def test_the_reference_is_the_policy_at_the_start_of_rl(
    found: dict[str, Any], hf_path: Path, samples: list[Sample]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(hf_path)
    assert found["reference"] == found["initial"]
    for sample in samples:
        ids = torch.tensor(sample.response_ids)[:, None]
        expected = response_logprobs(model, sample).gather(1, ids).squeeze(1)
        got, policy = (torch.tensor(found[name][sample.sample_id]) for name in ("reference", "policy"))
        if found["warmed_up"]:
            assert (got - expected).abs().max() > 1e-2, "the warm-up moved the policy"
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert (policy - got).abs().max() > 1e-3, "RL moved the policy"


def test_a_look_at_the_reference_leaves_the_policy_as_it_was(found: dict[str, Any]) -> None:
    assert found["policy_afterwards"] == found["policy"]


def test_the_loss_is_dppos_with_the_kl_term(found: dict[str, Any], samples: list[Sample], hf_path: Path) -> None:
    """By hand from log-probs: those of the sampled tokens as the trainer says, those of the top tokens likewise."""
    metrics = found["third_step"]
    total, size, ks = 0.0, 0.0, []
    for sample in samples:
        d = torch.tensor(found["policy"][sample.sample_id], dtype=torch.float64)
        d = d - torch.tensor(found["reference"][sample.sample_id], dtype=torch.float64)
        ks.append((-d).exp() - 1 + d)
    k3 = torch.cat(ks)
    assert metrics["policy/kl_ref/k3"] == pytest.approx(k3.mean().item(), rel=1e-4)
    assert k3.mean() > 1e-6
    if found["warmed_up"]:
        return
    # In the first step pi is transformers' own distribution, and pi = pi_ref.
    model = AutoModelForCausalLM.from_pretrained(hf_path)
    masks = []
    for sample in samples:
        log_pi, ids = response_logprobs(model, sample).double(), torch.tensor(sample.response_ids)[:, None]
        top_ids, top_mu = torch.tensor(sample.topk_ids), torch.tensor(sample.topk_behavior_logprobs).double().exp()
        mu, pi = torch.tensor(sample.behavior_logprobs).double().exp(), log_pi.gather(1, ids).squeeze(1).exp()
        top_pi = log_pi.gather(1, top_ids).exp()
        outside = ~(top_ids == ids).any(1)
        rest = 1 - top_pi.sum(1) - outside * pi, 1 - top_mu.sum(1) - outside * mu
        tv = ((top_pi - top_mu).abs().sum(1) + outside * (pi - mu).abs() + (rest[0] - rest[1]).abs()) / 2
        assert (tv - DELTA).abs().min() > 1e-5, "too close to the boundary to compare"
        mask = ~((sample.advantage * (pi - mu) > 0) & (tv > DELTA))
        terms = -sample.advantage * mask * pi / mu / 16 / len(samples)
        total, size = total + terms.sum().item(), size + terms.abs().sum().item()
        masks += (~mask).tolist() if sample.advantage else []
    assert 0.1 < sum(masks) / len(masks) < 0.9
    assert found["first_step"]["objective/clipped_share"] == pytest.approx(sum(masks) / len(masks))
    assert found["first_step"]["objective/loss"] == pytest.approx(total, abs=1e-4 * size)  # Tokens cancel.
    assert found["first_step"]["policy/kl_ref/k3"] == pytest.approx(0, abs=1e-9)


def test_a_resumed_run_has_the_same_reference_and_goes_on_bitwise(found: dict[str, Any]) -> None:
    assert found["resumed_reference"] == found["reference"]
    assert found["resumed_third_step"] == pytest.approx(found["third_step"], rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(found["resumed_weights"][name], weight) for name, weight in found["weights"].items())
