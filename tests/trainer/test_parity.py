"""Every layout trains like one process: same loss, log-probs and gradients, on real gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"num_ranks": 2, "tensor": 2, "sequence": True},
    "ep2": {"num_ranks": 2, "expert": 2},
    "tp2ep2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2},
    "pp2": {"num_ranks": 2, "pipeline": 2},
    "vpp2pp2": {"num_ranks": 2, "pipeline": 2, "virtual_pipeline": 2},
    "cp2": {"num_ranks": 2, "context": 2},
    "dp2": {"num_ranks": 2},
    "etp2": {"num_ranks": 2, "tensor": 2, "sequence": True, "expert_tensor": 2},
    "tp2pp2ep2": {"num_ranks": 4, "tensor": 2, "sequence": True, "pipeline": 2, "expert": 2},
}


def one_step(
    rank: int, world_size: int, hf_path: str, parallel: dict[str, Any], trainer_section: dict[str, Any]
) -> Any:
    """Log-probs, loss and the gradient of every HF tensor of one optimiser step. Gradients on rank 0 only."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    # Without sharding every data-parallel rank ends with the whole gradient; clipping would scale it in place.
    section = {
        "optimizer_steps_per_rollout": 1,
        "optimizer": {"lr": 1e-3, "distributed": False, "clip_grad": 1e9},
    } | trainer_section
    trainer = Trainer(tiny_config(hf_path, parallel, trainer=section))
    samples = random_samples(12)
    logprobs = trainer.compute_logprobs(samples)
    report = trainer.train_step(samples)
    with torch.no_grad():
        for chunk in trainer.chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    gradients = {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}
    return logprobs, report.metrics, gradients


@pytest.fixture(scope="module")
def hf_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("moe"), tiny_moe_config())


@pytest.fixture(scope="module")
def single(hf_path: Path) -> Any:
    return run_ranks(1, one_step, str(hf_path), {}, {})[0]


def assert_same(got: Any, expected: Any) -> None:
    for sample_id, values in expected[0].items():
        torch.testing.assert_close(torch.tensor(got[0][sample_id]), torch.tensor(values), rtol=1e-5, atol=1e-5)
    for name in ("objective/loss", "optim/grad_norm", "policy/entropy/mean", "objective/weight/min", "mismatch/k1"):
        assert got[1][name] == pytest.approx(expected[1][name], rel=1e-5, abs=1e-7), name
    assert got[2].keys() == expected[2].keys()
    worst = {n: ((got[2][n] - g).abs().max() / g.abs().max().clamp(min=1e-12)).item() for n, g in expected[2].items()}
    name = max(worst, key=lambda n: worst[n])
    assert worst[name] < 1e-5, f"{name}: relative difference {worst[name]:.1e}"


def test_single_process_gradient_is_that_of_transformers(hf_path: Path, single: Any) -> None:
    """DRPO's gradient by autograd through transformers' own model, sequence by sequence, no packing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_path)
    samples, total = random_samples(12), torch.zeros(())
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        start = len(sample.prompt_ids)
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(single[0][sample.sample_id]), logprobs.detach(), rtol=1e-4, atol=1e-4)
        mu, advantage = torch.tensor(sample.behavior_logprobs), sample.advantage
        ratio, shift = (logprobs - mu).exp(), logprobs.exp() - mu.exp()
        loss = -advantage * ratio + abs(advantage) * shift * (ratio - 1) / (2 * 0.15)
        total = total + loss.sum() / 16 / len(samples)  # sequence sum / horizon, then the mean over sequences
    total.backward()
    assert single[1]["objective/loss"] == pytest.approx(total.item(), rel=1e-4)
    reference = model.lm_head.weight.grad
    torch.testing.assert_close(
        single[2]["lm_head.weight"], reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item()
    )
    router = model.model.layers[1].mlp.gate.weight.grad
    got = single[2]["model.layers.1.mlp.gate.weight"]
    torch.testing.assert_close(got, router, rtol=1e-3, atol=1e-4 * router.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(layout: str, hf_path: Path, single: Any) -> None:
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel["num_ranks"], one_step, str(hf_path), parallel, {}, timeout_s=300)
    assert_same(ranks[0], single)
    same_report = pytest.approx(ranks[0][1], rel=0, abs=0, nan_ok=True)  # NaN: shares of bins without a token
    assert all(rank[1] == same_report for rank in ranks), "reports differ between ranks"
    assert all(rank[0] == ranks[0][0] for rank in ranks), "log-probs differ between ranks"


def test_packing_and_micro_batches_do_not_matter(hf_path: Path, single: Any) -> None:
    assert_same(run_ranks(1, one_step, str(hf_path), {}, {"max_tokens_per_micro_batch": 40})[0], single)
    assert_same(run_ranks(1, one_step, str(hf_path), {}, {"max_tokens_per_micro_batch": 1024})[0], single)
