"""`drpo-megatron train` from end to end: real Ray, real Megatron ranks, a real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drpo_megatron.cli import main
from drpo_megatron.config import load_config
from drpo_megatron.orchestration.run import read_inputs
from tests.orchestration import command
from tests.tiny import SAME_WEIGHTS, save_checkpoint, tiny_moe_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a finished run of four steps, with its checkpoints of steps 2 and 4.

    Its objective asks for all that can travel with a sample: the engine's top tokens and a reference policy.
    """
    directory = tmp_path_factory.mktemp("finished")
    objective = {"name": "dppo", "divergence": "topk_kl", "delta": 0.05, "num_topk": 4, "kl_ref": {"coef": 0.05}}
    rollout = {"max_response_tokens": 6, "dump": True}
    profile = {"profile": {"first_step": 2, "num_steps": 2}}
    trainer = {"loss_low_memory": True}
    command.prepare(directory, objective=objective, trainer=trainer, rollout=rollout, metrics=profile)
    code, output = command.run(directory, "train", "run.yaml")
    assert code == 0, output
    return directory


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    run = finished / "run"
    summary = json.loads((run / "summary.json").read_text())
    rows = command.metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert summary["policy_version"] == summary["num_steps"] == 4
    assert summary["heldout_before"] == rows[0]["eval/reward/mean"]
    assert summary["heldout_after"] == rows[4]["eval/reward/mean"]
    assert set(summary["peak_rss_mb"]) == {"trainer-rank0", "engine-0", "rewards", "driver"}
    of_the_driver = {"startup", "warmup", "wait_for_rollouts", "train", "sync", "eval", "checkpoint"}
    assert of_the_driver | {"generate", "reward"} <= set(summary["phase_s"])
    assert sum(summary["phase_s"][phase] for phase in of_the_driver) <= summary["wall_s"]
    assert (run / "training.png").is_file()
    assert sorted(log.name for log in (run / "logs").iterdir()) == ["engine-0.log", "rewards.log", "trainer-rank0.log"]
    assert rows[0]["warmup/loss/last"] < rows[0]["warmup/loss/first"]


def test_a_step_says_what_it_took_of_the_machine(finished: Path) -> None:
    weights = load_file(finished / "model" / "model.safetensors")
    experts = sum(tensor.numel() for name, tensor in weights.items() if ".experts." in name)
    others = sum(tensor.numel() for name, tensor in weights.items() if ".experts." not in name and "embed" not in name)
    met = others + experts / 2  # 2 of 4 experts; the embedding is a look-up.
    for row in command.metrics(finished / "run")[1:]:
        seconds = row["time/train_s"]
        num_tokens = row["throughput/train_tokens_per_s"] * seconds
        # 16 sequences, 2 layers of 4 heads of 16; attention of a token: 2 matmuls with half of its sequence, 3 passes.
        attention = 3 * 2 * 2 * 2 * (num_tokens / 16 / 2) * 4 * 16
        flops = row["throughput/train_tflops_per_s_per_rank"] * 1e12 * seconds
        assert flops == pytest.approx((6 * met + attention) * num_tokens)
        assert "throughput/mfu" not in row  # A CPU has no peak in the table.
        assert 50 < row["memory/trainer_mb/rank0"] == row["memory/trainer_mb/max"] < 10_000


def test_the_profile_holds_the_training_of_the_steps_asked_for(finished: Path) -> None:
    [file] = (finished / "run" / "profile").iterdir()
    assert file.name == "trainer-rank0-step2-3.json"
    events = json.loads(file.read_text())["traceEvents"]
    # An optimiser step is one call of Adam's on each of its buffers: 2 optimiser steps a step, 2 steps.
    assert sum(event["name"].startswith("Optimizer.step#") for event in events if "name" in event) >= 4
    assert any(event.get("name") == "aten::mm" for event in events)


def test_the_engine_draws_with_the_trainers_weights(finished: Path) -> None:
    # Before the first optimiser step of a rollout pi is mu: the ranks' weights reached the engine, and so did T.
    shifts = [row["mismatch/abs_prob_shift/max"] for row in command.metrics(finished / "run")[1:]]
    assert max(shifts) < SAME_WEIGHTS
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


def test_a_checkpoint_of_the_run_converts_to_what_the_run_exported(finished: Path, tmp_path: Path) -> None:
    assert main(["convert", "megatron-to-hf", "--megatron", str(finished / "run"), "--out", str(tmp_path / "hf")]) == 0
    converted, exported = (load_file(path / "hf" / "model.safetensors") for path in (tmp_path, finished / "run"))
    assert converted.keys() == exported.keys()
    assert all(torch.equal(converted[name], exported[name]) for name in exported)


@pytest.mark.slow
def test_a_run_starts_where_another_one_ended(finished: Path, tmp_path: Path) -> None:
    start = finished / "run" / "checkpoints" / "step_000004" / "trainer"
    command.prepare(tmp_path, model={"megatron_path": str(start)}, run={"run_dir": "run", "num_steps": 1})
    raw = yaml.safe_load((tmp_path / "run.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw | {"warmup": None}))
    code, output = command.run(tmp_path, "train", "run.yaml")
    assert code == 0, output
    before, after = command.metrics(tmp_path / "run")
    # The engine has the same weights from the first rollout on, and scores what the other run scored at its end.
    assert before["eval/reward/mean"] == command.metrics(finished / "run")[4]["eval/reward/mean"]
    assert after["mismatch/abs_prob_shift/max"] < SAME_WEIGHTS


def test_a_requeued_run_falls_back_and_equals_the_uninterrupted_one_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    """The newest checkpoint has one flipped bit; Slurm has requeued the job, so the one before it is taken."""
    directory = shutil.copytree(finished, tmp_path / "resumed")
    shutil.rmtree(directory / "run" / "hf")
    shard = directory / "run" / "checkpoints" / "step_000004" / "trainer" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    process = command.start(directory, "train", "--resume", "run", SLURM_RESTART_COUNT="1")
    code, output = command.finish(process, directory)
    assert code == 0, output
    assert "step_000004/trainer/__0_0.distcp is damaged: its checksum is" in output
    assert "Continuing from step_000002; the damaged one is kept as damaged-step_000004-" in output
    expected, resumed = command.metrics(finished / "run"), command.metrics(directory / "run")
    assert [row["step"] for row in resumed] == [0, 1, 2, 3, 4]
    for row, other in zip(expected, resumed, strict=True):
        timeless = {name for name in row if not name.startswith(("time/", "throughput/", "memory/"))}
        assert {name: row[name] for name in timeless} == {name: other[name] for name in timeless}
    assert_equal_weights(finished / "run", directory / "run")


def assert_equal_weights(run: Path, other: Path) -> None:
    """Of the models that two runs trained."""
    weights, others = (load_file(path / "hf" / "model.safetensors") for path in (run, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_training_from_the_dump_repeats_the_run_bit_by_bit(finished: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(finished, tmp_path / "replay", ignore=shutil.ignore_patterns("checkpoints", "hf"))
    arguments = ("run/config.yaml", "--from-dump", "run/rollouts", "run.run_dir=again", "rollout.dump=false")
    code, output = command.run(directory, "train", *arguments)
    assert code == 0, output
    assert sorted(log.name for log in (directory / "again" / "logs").iterdir()) == ["trainer-rank0.log"]
    expected, replayed = command.metrics(finished / "run"), command.metrics(directory / "again")
    assert replayed[0]["warmup/loss/last"] == expected[0]["warmup/loss/last"]
    for row, other in zip(expected[1:], replayed[1:], strict=True):
        from_engines = ("time/", "throughput/", "memory/", "eval/", "reward/failures", "rollout/num_dropped")
        numbers = {name: value for name, value in row.items() if not name.startswith(from_engines)}
        assert len(numbers) > 40
        assert {name: other[name] for name in numbers} == numbers
    assert_equal_weights(finished / "run", directory / "again")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.num_steps=5"], r"has no step_000005.jsonl, but run.num_steps=5; use run.num_steps=4"),
        (["warmup=null"], r"warmup is '3 steps of warmup.jsonl .*' there and 'none' here"),
        (["rollout.temperature=0.5"], r"rollout.temperature is 1.0 there and 0.5 here"),
        (["objective.num_topk=5"], r"objective=dppo needs the 5 most probable tokens .* and the dump has 4"),
        (["trainer.routing_replay=rollout"], r"needs routed experts, and the dump has none"),
        (["model.hf_path=other"], r"model num_layers is 2 there and 3 here; tokenizer is '\w+' there and '\w+' here"),
    ],
)
def test_a_dump_that_does_not_fit_is_refused_by_name(
    finished: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(finished)
    if not (finished / "other").exists():
        save_checkpoint(finished / "other", tiny_moe_config(num_hidden_layers=3))
        tokenizer = finished / "other" / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text().replace("t40", "u40"))
    config = load_config("run/config.yaml", ["rollout.from_dump=run/rollouts", *overrides])
    with pytest.raises(ValueError, match=message):
        read_inputs(config)


def test_eval_scores_the_trained_model_as_the_run_did(finished: Path) -> None:
    code, output = command.run(finished, "eval", "run", "--json")
    assert code == 0, output
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert json.loads(output.splitlines()[-1])["mean_reward"] == pytest.approx(summary["heldout_after"], abs=1e-9)
