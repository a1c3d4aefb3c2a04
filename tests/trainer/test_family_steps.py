"""RL steps of the families that differ most from Qwen3: mu is pi after every update, and a checkpoint resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.by_transformers import METRICS, exact_logprobs, exact_step
from tests.distributed import run_ranks
from tests.float64 import Exact
from tests.tiny import plain_model, save_checkpoint, tiny_config, tiny_mixtral_config, tiny_qwen3_5_config

MODELS = {"mixtral": tiny_mixtral_config(num_hidden_layers=2), "qwen3_5_moe": tiny_qwen3_5_config()}
TP2EP2 = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}


class Run(NamedTuple):
    """What one rank saw of one model."""

    outside: list[dict[str, float]]
    """Of each step, by how many limits log mu and log pi are not those of transformers with the same weights: 0 is
    within. On rank 0."""
    after: list[float]
    """The same of pi after the update."""
    metrics: dict[str, float]
    """Of a step after the checkpoint, on samples that are the same in every layout."""
    weights: dict[str, torch.Tensor]
    """In the checkpoint, by HF name, on rank 0."""
    exact: Exact | None
    """That step by transformers, on rank 0 of the ranks that didn't resume."""


def rl_steps(rank: int, world_size: int, root: Path, parallel: dict[str, Any], resume: bool) -> dict[str, Run]:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    return {name: _run(rank, root / name, parallel, resume) for name in MODELS}


def _run(rank: int, directory: Path, parallel: dict[str, Any], resume: bool) -> Run:
    from drpo_megatron.config.sections import TransformersEngineSection
    from drpo_megatron.rollout.engine import GenerationRequest, SamplingParams
    from drpo_megatron.rollout.transformers_engine import TransformersEngine
    from drpo_megatron.trainer.trainer import Trainer
    from drpo_megatron.types import Sample
    from drpo_megatron.weight_sync import publish
    from tests.tiny import random_samples

    optimizer = {"lr": 1e-2, "clip_grad": 1.0, "eps": 1e-4}
    trainer = Trainer(
        tiny_config(directory / "hf", parallel, trainer={"optimizer": optimizer, "optimizer_steps_per_rollout": 1})
    )
    engine = TransformersEngine(str(directory / "hf"), TransformersEngineSection()) if rank == 0 else None
    outside: list[dict[str, float]] = []
    after: list[float] = []
    for step in range(0 if resume else 2):
        load, finish = (engine.load_weights, engine.finish_update) if engine else (print, print)
        publish(trainer.export_weights(), step + 1, load, finish)
        drawn: list[Any] = [None]
        if engine is not None:
            requests = [GenerationRequest(f"p{i}", tuple(range(i, 3 * i + 2)), seed=i) for i in range(8)]
            completions = engine.generate(requests, SamplingParams(12))
            drawn = [
                [
                    Sample(r.request_id, r.prompt_ids, c.token_ids, c.logprobs, advantage=(-1.0) ** i)
                    for i, (r, c) in enumerate(zip(requests, completions, strict=True))
                ]
            ]
        dist.broadcast_object_list(drawn)
        (samples,) = drawn
        before, _, later = (
            trainer.compute_logprobs(samples),
            trainer.train_step(samples),
            trainer.compute_logprobs(samples),
        )
        if engine is not None:
            exact = exact_logprobs(_copy(engine, directory / "hf"), samples)
            mu = {sample.sample_id: sample.behavior_logprobs for sample in samples}
            outside.append({who: _outside(exact, samples, of) for who, of in (("mu", mu), ("pi", before))})
            after.append(_outside(exact, samples, later))
    if resume:
        trainer.load_checkpoint(directory / "checkpoint")
    else:
        trainer.save_checkpoint(directory / "checkpoint")
    weights = {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}
    last = None
    if engine is not None and not resume:
        engine.load_weights(weights.items())
        last = exact_step(_copy(engine, directory / "hf"), random_samples(8))
    return Run(outside, after, trainer.train_step(random_samples(8)).metrics, weights, last)


def _copy(engine: Any, hf_path: Path) -> Any:
    """The engine's weights in a model of plain operations."""
    model = plain_model(hf_path)
    model.load_state_dict(engine.model.state_dict())
    return model


def _outside(exact: Exact, samples: Any, logprobs: Any) -> float:
    """By how many times its limit the worst log-prob is off; 0 if none is."""
    drawn = torch.tensor([x for sample in samples for x in logprobs[sample.sample_id]])[:, None]
    return exact.outside({"drawn": drawn}).get("drawn", 0.0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("steps")
    for name, hf_config in MODELS.items():
        save_checkpoint(root / name / "hf", hf_config)
    return root


@pytest.fixture(scope="module")
def trained(root: Path) -> dict[str, Run]:
    return run_ranks(2, rl_steps, root, TP2EP2, False, timeout_s=240)[0]


@pytest.mark.parametrize("model", MODELS)
def test_mu_is_pi_after_every_update(trained: Any, model: str) -> None:
    assert trained[model].outside == [{"mu": 0, "pi": 0}] * 2
    assert min(trained[model].after) > 100  # Limits: with old weights it would be seen.


@pytest.fixture(scope="module")
def resumed(root: Path, trained: Any) -> dict[str, Run]:
    return run_ranks(1, rl_steps, root, {}, True, timeout_s=240)[0]


@pytest.mark.slow  # A second start of a rank: about 15 s on one core.
@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_of_two_ranks_continues_on_one(trained: Any, resumed: Any, model: str) -> None:
    saved, loaded = trained[model], resumed[model]
    assert saved.weights.keys() == loaded.weights.keys()
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in saved.weights.items())
    for run in (saved, loaded):
        assert saved.exact.outside({name: torch.tensor(run.metrics[name]) for name in METRICS}) == {}
