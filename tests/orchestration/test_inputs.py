"""What is wrong with a run's data, templates, functions and dumps, said by `read_inputs` before any process starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.cli import main
from drpo_megatron.config import Config, load_config
from drpo_megatron.orchestration.run import read_inputs
from drpo_megatron.rollout.dump import identity, rollout_file, write_rollout
from drpo_megatron.types import Completion, Prompt, RolloutGroup
from tests.orchestration import command
from tests.tiny import VOCAB


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("inputs")
    command.prepare(made)
    return made


def load(directory: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    monkeypatch.chdir(directory)
    return load_config("run.yaml", list(overrides))


# Prompts are two tokens, responses up to six, demonstrations two and three with EOS.


@pytest.mark.parametrize("context", [1, 2])
def test_a_micro_batch_holds_the_longest_prompt_and_response(
    directory: Path, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    """8 tokens, whatever the one-token prompt of the config check needs; with zig-zag chunks a multiple of 2 x 2."""
    layout = [f"parallel={{num_ranks: {context}, context: {context}}}"]
    read_inputs(load(directory, monkeypatch, *layout, "trainer.max_tokens_per_micro_batch=8"))
    too_small = load(directory, monkeypatch, *layout, "trainer.max_tokens_per_micro_batch=7")
    with pytest.raises(
        ValueError, match=r"train.jsonl: prompt p0 of 2 tokens .* up to 8 tokens, more than .*=7; raise"
    ):
        read_inputs(too_small)
    assert main(["train", "run.yaml", "--dry-run", "trainer.max_tokens_per_micro_batch=7"]) == 2


def test_a_micro_batch_holds_the_longest_demonstration(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["rollout.max_response_tokens=2", "trainer.max_tokens_per_micro_batch=5"]
    with pytest.raises(ValueError, match=r"warmup.jsonl: demonstration warmup-0 makes a sequence of up to 6 tokens"):
        read_inputs(load(directory, monkeypatch, *sizes))
    read_inputs(load(directory, monkeypatch, *sizes, "warmup=null"))


def test_the_real_length_of_prompts_counts(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"id": f"q{i}", "prompt": "t1 " * (i + 1), "answer": "1"} for i in range(9)]
    (directory / "long.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = load(directory, monkeypatch, "data.train=long.jsonl", "trainer.max_tokens_per_micro_batch=14")
    with pytest.raises(ValueError, match="prompt q8 of 9 tokens with rollout.max_response_tokens=6 .* up to 15 tokens"):
        read_inputs(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward={name: import, path: 'my_rewards:missing'}", "my_rewards has no callable 'missing'"),
        ("reward={name: import, path: 'no_such_module:f'}", "module 'no_such_module' cannot be imported"),
        ("reward={name: import, path: 'bad_rewards:Scorer'}", "Scorer is a class"),
        ("reward={name: import, path: 'bad_rewards:two'}", "two is called with 3 positional arguments"),
        ("objective={name: import, path: 'no_such_module:f'}", "objective path='no_such_module:f': module"),
        ("objective={name: import, path: 'bad_rewards:later'}", "objective path='bad_rewards:later': later is async"),
    ],
)
def test_a_dry_run_finds_a_function_that_can_not_be_called(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    (directory / "bad_rewards.py").write_text(
        "async def later(a, b, c): return 1.0\nclass Scorer: pass\ndef two(a, b): return 1.0\n"
    )
    monkeypatch.chdir(directory)
    assert main(["train", "run.yaml", "--dry-run", override]) == 2
    error = capsys.readouterr().err
    title, problem = error.splitlines()
    assert title.endswith("1 problem") and message in problem and "Traceback" not in error


def test_a_dry_run_lists_the_answers_that_the_reward_can_not_read(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": f"t{i}", "answer": "many" if i == 3 else str(i)} for i in range(9)]
    (directory / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(directory)
    arguments = ["data={train: sums.jsonl, heldout: sums.jsonl}", "reward={name: arithmetic}"]
    assert main(["train", "run.yaml", "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("1 of 9 answers of sums.jsonl can't be read by reward=arithmetic: never right") == 2
    assert printed.count("sums.jsonl, line 4: 'many' (prompt sums-3)") == 2
    assert main(["train", "run.yaml", "--dry-run", "reward={name: arithmetic}"]) == 2  # Every answer is `even`.
    assert "16 of 16 answers of train.jsonl can't be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c | {"token_ids": (1, VOCAB)},
            f"token 1 of completion 0 is {VOCAB}; ids are .* vocabulary's {VOCAB}",
        ),
        (lambda c: c | {"logprobs": (-1.0, float("nan"))}, "holds NaN, which is no JSON"),
        (lambda c: c | {"logprobs": (0.5, -1.0)}, "log mu 0 of completion 0 is 0.5"),
        (lambda c: c | {"logprobs": (-1.0,)}, "completion 0 has 2 token_ids and 1 logprobs"),
        (lambda c: c | {"token_ids": (1,) * 200, "logprobs": (-1.0,) * 200}, "a sequence has 202 tokens, more than"),
    ],
)
def test_a_dump_that_can_not_be_trained_on_is_refused_by_file_and_line(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    config = load(directory, monkeypatch, "run.num_steps=1", f"rollout.from_dump={tmp_path}")
    fields = {"token_ids": (1, 2), "logprobs": (-1.0, -2.0), "finish_reason": "stop", "text": "", "policy_version": 0}
    good, bad = Completion(**fields), Completion(**change(fields))
    groups = [RolloutGroup(Prompt(f"p{i}", (1, 2), "even"), (good, good), (0.0, 1.0)) for i in range(2)]
    file = rollout_file(tmp_path, 1)
    write_rollout(file, 1, groups, identity(config))
    read_inputs(config)
    groups[1] = RolloutGroup(groups[1].prompt, (bad, good), (0.0, 1.0))
    write_rollout(file, 1, groups, identity(config))
    with pytest.raises(ValueError, match=rf"{file}, line 3.*{message}"):
        read_inputs(config)
