"""`drpo-megatron eval --out`: killed half-way, it goes on from what is written and ends with the same numbers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from drpo_megatron.orchestration import evaluate
from drpo_megatron.orchestration.evaluate import EvalOptions, evaluate_model
from tests.orchestration import command

_NUM_PROBLEMS, _SAMPLES = 8, 16


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "scores.jsonl"
    options = {"prompts": "heldout.jsonl", "samples": _SAMPLES, "max_response_tokens": 8, "seed": 1}
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    reward = "my_rewards:share_of_even_tokens"

    process = command.start(tmp_path, "eval", "model", *flags, "--reward", reward, "--out", str(out))
    deadline = time.monotonic() + 300
    while not out.is_file() or out.read_text().count("\n") < 2:
        assert process.poll() is None or out.is_file(), (tmp_path / "output.txt").read_text()
        assert time.monotonic() < deadline, "no problem was scored within 300 s"
        time.sleep(0.05)
    command.kill_group(process)
    lines = out.read_text().splitlines(keepends=True)[:4]
    out.write_text("".join(lines)[:-5])  # However far it came: the head, two problems and a half line.

    said: list[str] = []
    monkeypatch.setattr(evaluate, "_SAMPLES_AT_ONCE", 2 * _SAMPLES)
    resumed = evaluate_model(Path("model"), EvalOptions(**options, reward=reward, out=out), said.append)
    assert said[0].endswith("scores.jsonl has 2 of 8 problems; 6 are left")
    assert said[1:] == ["4 of 8 problems", "6 of 8 problems", "8 of 8 problems"]
    assert len({json.loads(line).get("prompt_id") for line in out.read_text().splitlines()}) == _NUM_PROBLEMS + 1

    whole = evaluate_model(Path("model"), EvalOptions(**options, reward=reward), said.append)
    assert resumed == whole
    assert whole.num_problems * whole.samples_per_prompt == _NUM_PROBLEMS * _SAMPLES and whole.low < whole.mean

    with pytest.raises(ValueError, match="holds scores with seed=1, not 2"):
        evaluate_model(Path("model"), EvalOptions(**options | {"seed": 2}, reward=reward, out=out), said.append)
