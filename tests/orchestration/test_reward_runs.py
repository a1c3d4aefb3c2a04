"""Whole runs with rewards that are not 0 or 1, and with rewards that never come out: real processes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from drpo_megatron.intervals import HeldOut
from tests.orchestration import command

_REWARDS = """
async def plus_or_minus_one(response, answer, prompt, *, num_tokens, finish_reason, metadata):
    reward = 1.0 if response and int(response.split()[0][1:]) % 2 == 0 else -1.0
    return {"reward": reward, "is_right": reward > 0, "tokens": num_tokens, "is_cut": finish_reason == "length"}

def raises(response, answer, prompt):
    raise KeyError("verdict")
"""


def test_rewards_of_plus_and_minus_one_have_their_mean_and_interval_everywhere(tmp_path: Path) -> None:
    command.prepare(tmp_path, warmup=None, checkpoint={"every": 0}, metrics={"console": "plain"})
    (tmp_path / "my_rewards.py").write_text(_REWARDS)
    reward = "reward={name: import, path: 'my_rewards:plus_or_minus_one'}"
    code, output = command.run(tmp_path, "train", "run.yaml", "warmup=null", "run.num_steps=1", reward)
    assert code == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for row, when in zip(command.metrics(tmp_path / "run"), ("before", "after"), strict=True):
        found = HeldOut.of(row)
        assert found is not None and not found.is_accuracy and "eval/accuracy" not in row
        assert -1 <= found.low < found.mean < found.high <= 1 or found.mean in (-1, 1)
        assert summary[f"heldout_{when}"] == found.mean
        assert summary[f"heldout_{when}_interval"] == [found.low, found.high]
        assert row["eval/reward/is_right"] == pytest.approx((found.mean + 1) / 2)
        assert f"held-out mean reward {found.text()}" in output
    step = command.metrics(tmp_path / "run")[1]
    assert step["reward/is_right"] == pytest.approx((step["reward/mean"] + 1) / 2)
    assert step["reward/tokens"] == pytest.approx(step["rollout/response_length/mean"])
    assert step["reward/is_cut"] == pytest.approx(step["rollout/truncated_share"])
    assert "held-out problems, mean reward (95 % interval)" in output and "accuracy" not in output
    assert (tmp_path / "run" / "training.png").is_file()

    code, output = command.run(tmp_path, "eval", "run", "--samples", "2")
    assert code == 0, output
    assert re.search(r"mean reward \(avg@2\) -?[\d.]+ \(95 % interval -?[\d.]+ to -?[\d.]+; 8 problems x 2", output)
    assert "no pass@k: rewards are not all 0 or 1; --threshold R" in output and "accuracy" not in output


@pytest.mark.parametrize("arguments", [("train", "run.yaml", "warmup=null"), ("eval", "model")])
def test_rewards_that_all_fail_end_a_run_and_an_evaluation_with_the_reason(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command.prepare(tmp_path)
    (tmp_path / "my_rewards.py").write_text(_REWARDS)
    path = "my_rewards:raises"
    if arguments[0] == "train":
        options = ["reward={name: import, path: '" + path + "'}"]
    else:
        options = ["--prompts", "heldout.jsonl", "--max-response-tokens", "4", "--reward", path]
    code, output = command.run(tmp_path, *arguments, *options)
    assert code in (1, 2), output
    error = next(line for line in output.splitlines() if line.startswith("error: "))
    for part in ("8 of 8 rewards failed in", "my_rewards:raises", "KeyError: 'verdict'", "p16"):
        assert part in error
    assert "Traceback" not in output and "accuracy" not in output
