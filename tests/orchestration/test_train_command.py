"""`drpo-megatron train` from end to end: real Ray, real Megatron ranks, a real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.orchestration import command


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished run of four steps, with its checkpoints of steps 2 and 4.

    Its objective asks for all that can travel with a sample: the engine's top tokens and a reference policy.
    """
    directory = tmp_path_factory.mktemp("finished")
    objective = {"name": "dppo", "divergence": "topk_kl", "delta": 0.05, "num_topk": 4, "kl_ref": {"coef": 0.05}}
    command.prepare(directory, objective=objective, trainer={"loss_low_memory": True})
    code, output = command.run(directory, "train", "run.yaml")
    assert code == 0, output
    return directory


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    rows = command.metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert summary["policy_version"] == summary["num_steps"] == 4
    assert summary["heldout_before"] == rows[0]["eval/accuracy"]
    assert summary["heldout_after"] == rows[4]["eval/accuracy"]
    assert set(summary["peak_rss_mb"]) == {"trainer-rank0", "engine-0", "rewards", "driver"}
    assert {"startup", "warmup", "generate", "reward", "train", "sync", "eval", "checkpoint"} <= set(summary["phase_s"])
    assert sum(summary["phase_s"].values()) <= summary["wall_s"]
    assert (run / "training.png").is_file()
    assert sorted(log.name for log in (run / "logs").iterdir()) == ["engine-0.log", "rewards.log", "trainer-rank0.log"]
    assert rows[0]["warmup/loss/last"] < rows[0]["warmup/loss/first"]


def test_the_engine_draws_with_the_trainers_weights(finished: Path) -> None:
    # Before the first optimiser step of a rollout pi is mu: the ranks' weights reached the engine, and so did T.
    shifts = [row["mismatch/abs_prob_shift/max"] for row in command.metrics(finished / "run")[1:]]
    assert max(shifts) < 1e-4
    # Later optimiser steps of a rollout move pi away from mu: had nothing been trained, this would be small, too.
    assert max(row["shift/abs_prob_shift/max"] for row in command.metrics(finished / "run")[1:]) > 1e-3


def test_the_policy_leaves_the_reference_where_the_warm_up_left_it(finished: Path) -> None:
    k3 = [row["policy/kl_ref/k3"] for row in command.metrics(finished / "run")[1:]]
    assert 0 < k3[0] < k3[3]
    # The reference is what the warm-up made of the checkpoint, which the engine drew the first rollout from.
    trained, initial = (load_file(finished / path / "model.safetensors") for path in ("run/reference", "model"))
    assert any(not torch.equal(trained[name], initial[name]) for name in trained)


def test_transformers_loads_the_trained_model(finished: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(finished / "run" / "hf")
    before = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert (trained(tokens).logits - before(tokens).logits).abs().max() > 1e-3


def test_a_resumed_run_equals_the_uninterrupted_one_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished, tmp_path / "resumed")
    shutil.rmtree(directory / "run" / "checkpoints" / "step_000004")
    shutil.rmtree(directory / "run" / "hf")
    code, output = command.run(directory, "train", "--resume", "run")
    assert code == 0, output
    expected, resumed = command.metrics(finished / "run"), command.metrics(directory / "run")
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    for row, other in zip(expected, resumed, strict=True):
        timeless = {name for name in row if not name.startswith(("time/", "throughput/"))}
        assert {name: row[name] for name in timeless} == {name: other[name] for name in timeless}
    weights = load_file(finished / "run" / "hf" / "model.safetensors")
    others = load_file(directory / "run" / "hf" / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_eval_scores_the_trained_model_as_the_run_did(finished: Path) -> None:
    code, output = command.run(finished, "eval", "run", "--json")
    assert code == 0, output
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert json.loads(output.splitlines()[-1])["accuracy"] == pytest.approx(summary["heldout_after"], abs=1e-9)
