"""Rollouts ahead of the trainer (rollout.max_staleness), with real engines, ranks and rewards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drpo_megatron.config import load_config
from drpo_megatron.orchestration.replay import DumpedRollouts
from drpo_megatron.types import RolloutGroup
from tests.orchestration import command
from tests.tiny import SAME_WEIGHTS

_BAD_REWARD = """
from pathlib import Path
import time

def once(name):
    mark = Path(name)
    return not mark.exists() and not mark.touch()

def hangs_once_and_raises_once(response, answer, prompt):
    if prompt.prompt_id == "p3" and once("raised"):
        raise RuntimeError("no reward today")
    if prompt.prompt_id == "p5" and once("hung"):
        time.sleep(3600)
    return 1.0
"""


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run of four steps that draws one step ahead, checkpoints of steps 2 and 4.

    The trainer replays the engine's routing, so routed experts travel through buffer, dump and checkpoint.
    """
    directory = tmp_path_factory.mktemp("ahead")
    rollout = {"max_response_tokens": 6, "max_staleness": 1, "dump": True}
    command.prepare(directory, rollout=rollout, trainer={"routing_replay": "rollout"})
    code, output = command.run(directory, "train", "run.yaml")
    assert code == 0, output
    return directory


def dumped(directory: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[RolloutGroup]]:
    """What each step of the run in `directory` trained on."""
    monkeypatch.chdir(directory)
    config = load_config("run/config.yaml")
    source = DumpedRollouts(Path("run/rollouts"), config)
    return [source.take(step, 0)[0] for step in range(1, config.run.num_steps + 1)]


def test_every_step_but_the_first_trains_on_what_the_version_before_drew(
    ahead: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = command.metrics(ahead / "run")[1:]
    assert [row["rollout/staleness/mean"] for row in rows] == [0, 1, 1, 1]
    assert [row["rollout/staleness/max"] for row in rows] == [0, 1, 1, 1]
    assert [row["rollout/num_dropped/sum"] for row in rows] == [0, 0, 0, 0]
    versions = [{c.policy_version for g in groups for c in g.completions} for groups in dumped(ahead, monkeypatch)]
    assert versions == [{0}, {0}, {1}, {2}]
    # mu is that of the version that drew: of the trainer's own weights at first, of the weights before them later.
    assert rows[0]["mismatch/abs_prob_shift/max"] < SAME_WEIGHTS < rows[1]["mismatch/abs_prob_shift/max"]


def test_tokens_go_to_the_experts_that_the_version_before_chose(ahead: Path) -> None:
    rows = command.metrics(ahead / "run")[1:]
    assert [row["mismatch/router_flips/share"] for row in rows] == [0.0] * 4
    # Drawn by the same weights both routers choose alike, but for ties; by older ones they don't.
    overruled = [row["mismatch/router_overruled/share"] for row in rows]
    assert overruled[0] < 0.01 < max(overruled[1:])


def test_no_prompt_is_lost_or_doubled(ahead: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = dumped(ahead, monkeypatch)
    assert [len(groups) for groups in steps] == [4, 4, 4, 4]
    assert sorted(group.prompt.prompt_id for groups in steps for group in groups) == sorted(f"p{i}" for i in range(16))
    assert all(len(group.completions) == len(group.rewards) == 4 for groups in steps for group in groups)


def test_engines_draw_while_the_trainer_trains(ahead: Path) -> None:
    rows = command.metrics(ahead / "run")[1:]
    # Nothing is drawn ahead of the last step.
    assert [row.get("time/overlap_share", 0.0) > 0 for row in rows] == [True, True, True, False]
    assert [row.get("time/generate_s", 0.0) > 0 for row in rows] == [True, True, True, False]
    for row in rows:
        assert row["time/wait_for_rollouts_s"] + row["time/train_s"] <= row["time/step_s"]
        assert 0 <= row["time/engines_idle_s"] <= row["time/step_s"]


@pytest.mark.slow
def test_a_run_that_draws_ahead_resumes_bit_by_bit(ahead: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(ahead, tmp_path / "resumed")
    for later in ("checkpoints/step_000004", "hf", "rollouts"):
        shutil.rmtree(directory / "run" / later)
    state = json.loads((directory / "run" / "checkpoints" / "step_000002" / "rollouts.json").read_text())
    assert len(state["buffer"]["groups"]) == 4  # Drawn ahead for step 3, before the checkpoint.
    code, output = command.run(directory, "train", "--resume", "run")
    assert code == 0, output
    expected, resumed = command.metrics(ahead / "run"), command.metrics(directory / "run")
    for row, other in zip(expected, resumed, strict=True):
        timeless = {name for name in row if not name.startswith(("time/", "throughput/", "memory/"))}
        assert {name: row[name] for name in timeless} == {name: other[name] for name in timeless}
    for step in (3, 4):
        name = f"run/rollouts/step_{step:06d}.jsonl"
        assert (directory / name).read_bytes() == (ahead / name).read_bytes()


@pytest.mark.slow
def test_a_reward_that_hangs_or_raises_costs_one_sample_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = {"name": "import", "path": "bad_reward:hangs_once_and_raises_once", "timeout_s": 20}
    (tmp_path / "bad_reward.py").write_text(_BAD_REWARD)
    command.prepare(
        tmp_path,
        reward=reward,
        data={"train": "train.jsonl", "heldout": None},
        rollout={"max_response_tokens": 6, "max_staleness": 1, "dump": True},
    )
    code, output = command.run(tmp_path, "train", "run.yaml")
    assert code == 0, output
    assert command.metrics(tmp_path / "run")[-1]["reward/failures/sum"] == 2
    groups = [group for groups in dumped(tmp_path, monkeypatch) for group in groups]
    failed = {group.prompt.prompt_id: group.rewards.count(0.0) for group in groups if 0.0 in group.rewards}
    assert failed == {"p3": 1, "p5": 1}
    assert "no reward today" in (tmp_path / "run" / "logs" / "rewards.log").read_text()


@pytest.mark.slow
def test_rollouts_alone_can_be_trained_on_and_twice_alike(tmp_path: Path) -> None:
    command.prepare(tmp_path, data={"train": "train.jsonl", "heldout": None})
    code, output = command.run(
        tmp_path, "rollout", "run.yaml", "--out", "drawn", "--steps", "2", "rollout.max_staleness=1"
    )
    assert code == 0, output
    assert sorted(path.name for path in (tmp_path / "drawn" / "logs").iterdir()) == ["engine-0.log", "rewards.log"]
    code, output = command.run(tmp_path, "rollout", "run.yaml", "--out", "drawn")
    assert code == 2 and "drawn is not empty" in output
    code, output = command.run(tmp_path, "train", "run.yaml", "--from-dump", "drawn", "run.num_steps=2")
    assert code == 2 and "warmup is 'none' there and '3 steps of warmup.jsonl" in output
    for name in ("first", "second"):
        overrides = ("run.num_steps=2", "warmup=null", f"run.run_dir={name}")
        code, output = command.run(tmp_path, "train", "run.yaml", "--from-dump", "drawn", *overrides)
        assert code == 0, output
    rows, others = (command.metrics(tmp_path / name) for name in ("first", "second"))
    assert [row["objective/loss"] for row in rows] == [row["objective/loss"] for row in others]
    weights, again = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    # Both steps' rollouts are of the initial policy: exactly on-policy at first, one version stale then.
    assert [row["rollout/staleness/max"] for row in rows] == [0, 1]
    assert rows[0]["mismatch/abs_prob_shift/max"] < SAME_WEIGHTS
