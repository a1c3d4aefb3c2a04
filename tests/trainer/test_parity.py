"""Every layout trains as transformers would: same loss, log-probs and gradients, on real gloo ranks.

Each is compared with FP64, within what FP32 may lose there (tests.float64).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drpo_megatron.types import Sample
from tests.by_transformers import by_trainer, drpo_step, exact_step
from tests.distributed import run_ranks
from tests.float64 import Exact
from tests.tiny import VOCAB, plain_model, random_samples, save_checkpoint, tiny_config, tiny_moe_config

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
def reference(hf_path: Path) -> Exact:
    return exact_step(plain_model(hf_path), random_samples(12))


def assert_same(got: Any, expected: Exact) -> None:
    mine = by_trainer(*got)
    assert mine.keys() == expected.values.keys()
    assert expected.outside(mine) == {}


def test_one_process_steps_like_transformers(hf_path: Path, reference: Exact) -> None:
    """DRPO's loss and every gradient by autograd through transformers' own model, without packing."""
    assert_same(run_ranks(1, one_step, str(hf_path), {}, {})[0], reference)


def _scaled(samples: list[Sample], by: float) -> list[Sample]:
    return [replace(samples[0], advantage=by * samples[0].advantage), *samples[1:]]


def _shifted(samples: list[Sample]) -> list[Sample]:
    """mu of the first sequence, by one token."""
    mu = samples[0].behavior_logprobs
    return [replace(samples[0], behavior_logprobs=(*mu[1:], mu[0])), *samples[1:]]


def test_the_limits_pass_transformers_own_fp32_and_no_wrong_step(hf_path: Path, reference: Exact) -> None:
    model, samples = plain_model(hf_path), random_samples(12)
    assert reference.outside(drpo_step(model, samples)) == {}
    assert reference.outside(drpo_step(model, samples, delta=0.1501)), "another delta"
    assert reference.outside(drpo_step(model, _scaled(samples, 1.001))), "an advantage that is off by 0.1 %"
    assert reference.outside(drpo_step(model, _shifted(samples))), "mu of another token"
    model.lm_head.weight.data[: VOCAB // 2] *= 1.0001
    assert reference.outside(drpo_step(model, samples)), "half of the LM head off by 0.01 %, as a wrong shard may be"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_steps_like_transformers(layout: str, hf_path: Path, reference: Exact) -> None:
    parallel = LAYOUTS[layout]
    ranks = run_ranks(parallel["num_ranks"], one_step, str(hf_path), parallel, {}, timeout_s=300)
    assert_same(ranks[0], reference)
    same_report = pytest.approx(ranks[0][1], rel=0, abs=0, nan_ok=True)  # NaN: shares of bins without a token
    assert all(rank[1] == same_report for rank in ranks), "reports differ between ranks"
    assert all(rank[0] == ranks[0][0] for rank in ranks), "log-probs differ between ranks"


def test_packing_and_micro_batches_do_not_matter(hf_path: Path, reference: Exact) -> None:
    assert_same(run_ranks(1, one_step, str(hf_path), {}, {"max_tokens_per_micro_batch": 40})[0], reference)
    assert_same(run_ranks(1, one_step, str(hf_path), {}, {"max_tokens_per_micro_batch": 1024})[0], reference)
