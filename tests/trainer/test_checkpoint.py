"""A checkpoint continues exactly: bitwise in the same layout, to rounding in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import random_samples, save_checkpoint, tiny_config, tiny_moe_config

TP2EP2 = {"num_ranks": 2, "tensor": 2, "sequence": True, "expert": 2}


def train(
    rank: int,
    world_size: int,
    hf_path: str,
    parallel: dict[str, Any],
    load: str | None,
    save: str | None,
    precision: str = "bf16",
) -> Any:
    """Two rollouts, or (when `load` is given) the second of them only. What the second reported, and the weights."""
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.trainer.trainer import Trainer

    # Wide, so that the first steps of Adam, which are of size lr whatever the gradient's rounding, stay comparable.
    trainer = Trainer(
        tiny_config(
            hf_path,
            parallel,
            trainer={"optimizer": {"lr": 1e-3, "schedule": "cosine", "eps": 1e-4}},
            precision={"train": {"name": precision}},
        )
    )
    if load is None:
        trainer.train_step(random_samples(8, seed=1))
        if save is not None:
            trainer.save_checkpoint(Path(save))
    else:
        trainer.load_checkpoint(Path(load))
    report = trainer.train_step(random_samples(8, seed=2))
    weights = {name: tensor.clone() for name, tensor in trainer.export_weights() if tensor is not None}
    return report.metrics, weights, report.policy_version


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Any]:
    scratch = tmp_path_factory.mktemp("resume")
    hf_path = str(save_checkpoint(scratch / "hf", tiny_moe_config(num_hidden_layers=2)))
    checkpoint = str(scratch / "checkpoint")
    return hf_path, checkpoint, run_ranks(2, train, hf_path, TP2EP2, None, checkpoint)[0]


def test_same_layout_continues_bitwise(saved: tuple[str, str, Any]) -> None:
    hf_path, checkpoint, (metrics, weights, version) = saved
    resumed_metrics, resumed_weights, resumed_version = run_ranks(2, train, hf_path, TP2EP2, checkpoint, None)[0]
    assert resumed_metrics == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert resumed_version == version == 2
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())


def test_delayed_scaling_continues_with_its_history(saved: tuple[str, str, Any], tmp_path: Path) -> None:
    hf_path, delayed = saved[0], "fp8-delayed"
    [(metrics, weights, _)] = run_ranks(1, train, hf_path, {}, None, str(tmp_path / "checkpoint"), delayed)
    [(resumed_metrics, resumed_weights, _)] = run_ranks(
        1, train, hf_path, {}, str(tmp_path / "checkpoint"), None, delayed
    )
    assert resumed_metrics == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(resumed_weights[name], weight) for name, weight in weights.items())
    (tmp_path / "checkpoint" / "amax_history-rank0.safetensors").unlink()
    [(_, anew, _)] = run_ranks(1, train, hf_path, {}, str(tmp_path / "checkpoint"), None, delayed)
    assert not all(torch.equal(anew[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "parallel", [{}, {"num_ranks": 2, "pipeline": 2}, {"num_ranks": 2}], ids=["single", "pp2", "dp2"]
)
def test_another_layout_continues(parallel: dict[str, Any], saved: tuple[str, str, Any]) -> None:
    """Optimizer state moves too, from EP 2 to EP 1: without it the next AdamW step would differ at once."""
    hf_path, checkpoint, (metrics, weights, _) = saved
    ranks = run_ranks(parallel.get("num_ranks", 1), train, hf_path, parallel, checkpoint, None)
    resumed_metrics, resumed_weights, _ = ranks[0]
    assert resumed_metrics["objective/loss"] == pytest.approx(metrics["objective/loss"], rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(
            resumed_weights[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_directory_without_a_finished_checkpoint_is_refused(tmp_path: Path) -> None:
    from drpo_megatron.trainer.platform import activate

    activate("cpu")
    from drpo_megatron.checkpoint.megatron import read_counters

    with pytest.raises(ValueError, match="no finished checkpoint: trainer.json is missing"):
        read_counters(tmp_path)
    (tmp_path / "trainer.json").write_text('{"counters": ')
    with pytest.raises(ValueError, match="is damaged"):
        read_counters(tmp_path)
