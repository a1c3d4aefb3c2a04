"""Prompt files, the chat template, and the stream that training draws from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_megatron.data.prompts import PromptStream, read_demonstrations, read_prompts
from drpo_megatron.data.tokenize import decode, encode_demonstration, encode_prompt, load_tokenizer
from drpo_megatron.types import Prompt
from tests.tiny import save_checkpoint, tiny_config, tiny_moe_config

CONTEXT = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), tiny_moe_config(max_position_embeddings=CONTEXT))


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return load_tokenizer(checkpoint)


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def config(checkpoint: Path, **data: Any) -> Any:
    return tiny_config(checkpoint, data=data)


def test_lines_become_prompts_in_order(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "train.jsonl",
        {"id": "a", "question": "t1 t2", "answer": 7, "level": 3},
        "",
        {"question": "t4", "answer": "x"},
    )
    first, second = read_prompts(file, tokenizer, config(checkpoint, prompt_field="question"))
    assert first == Prompt("a", (1, 2), "7", "t1 t2", {"level": 3})
    assert second == Prompt("train-1", (4,), "x", "t4", {})


def test_the_system_prompt_goes_through_the_template(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", {"prompt": "t4", "answer": "x"})
    (prompt,) = read_prompts(file, tokenizer, config(checkpoint, system_prompt="t9 "))
    assert prompt.token_ids == (9, 4)


def test_the_generation_prompt_ends_the_prompt(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %} t7{% endif %}"
    assert encode_prompt(tokenizer, "t1") == (1, 7)


def test_a_demonstration_ends_with_eos_which_is_not_decoded(tokenizer: Any) -> None:
    ids = encode_demonstration(tokenizer, "t5 t6")
    assert ids == (5, 6, tokenizer.eos_token_id)
    assert decode(tokenizer, ids) == "t5 t6"


def test_demonstrations_are_samples_of_advantage_one(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "demo.jsonl", {"prompt": "t1 t2", "answer": "3", "response": "t3"})
    (sample,) = read_demonstrations(file, tokenizer, config(checkpoint))
    assert (sample.prompt_ids, sample.response_ids) == ((1, 2), (3, tokenizer.eos_token_id))
    assert (sample.advantage, sample.behavior_logprobs) == (1.0, (0.0, 0.0))


GOOD = {"prompt": "t1", "answer": "1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "train.jsonl is empty"),
        ([GOOD, '{"prompt": '], "train.jsonl, line 2 is not JSON"),
        ([GOOD, "[1]"], "train.jsonl, line 2 holds a list, not an object"),
        ([GOOD, {"prompt": "t1"}], "train.jsonl, line 2 has no field 'answer'; it has: prompt"),
        ([{"prompt": ["t1"], "answer": "1"}], r"train.jsonl, line 1: field 'prompt' is \['t1'\]; it must be text"),
        ([GOOD | {"id": "a"}, GOOD | {"id": "a"}], "line 2: id 'a' was used before, at .*train.jsonl, line 1"),
    ],
)
def test_a_bad_line_is_named(checkpoint: Path, tokenizer: Any, tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / "train.jsonl", *lines), tokenizer, config(checkpoint))


def test_a_missing_file_is_named(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl does not exist"):
        read_prompts(tmp_path / "nowhere.jsonl", tokenizer, config(checkpoint))


def test_prompts_that_are_too_long_are_listed(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    # The context of 24 leaves 8 tokens beside a response of 16.
    lines = [{"id": f"p{n}", "prompt": "t1 " * n, "answer": "1"} for n in (8, 9, 12)]
    with pytest.raises(ValueError, match=r"2 prompts of .* more than 8 tokens.*24 minus.*=16: p9 \(9\), p12 \(12\)"):
        read_prompts(write(tmp_path / "train.jsonl", *lines), tokenizer, config(checkpoint))
    with pytest.raises(ValueError, match=r"more than 7 tokens, data.max_prompt_tokens: p8 \(8\)"):
        read_prompts(tmp_path / "train.jsonl", tokenizer, config(checkpoint, max_prompt_tokens=7))


def test_a_demonstration_must_fit_the_context(checkpoint: Path, tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "demo.jsonl", {"prompt": "t1", "answer": "1", "response": "t1 " * 24})
    with pytest.raises(ValueError, match=r"demonstrations of .* more than 24 tokens.*demo-0 \(26\)"):
        read_demonstrations(file, tokenizer, config(checkpoint))


def test_a_directory_without_tokenizer_or_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer(tmp_path)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(str(i), (i,), str(i)) for i in range(count)]


def ids(taken: list[Prompt]) -> list[int]:
    return [int(prompt.prompt_id) for prompt in taken]


@settings(deadline=None, max_examples=50)
@given(
    size=st.integers(1, 12),
    shuffle=st.booleans(),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    stop=st.integers(0, 11),
)
def test_a_resumed_stream_continues_and_no_take_holds_a_prompt_twice(
    size: int, shuffle: bool, counts: list[int], stop: int
) -> None:
    counts = [min(count, size) for count in counts]
    stream = PromptStream(prompts(size), seed=3, shuffle=shuffle)
    taken, saved = [], stream.state_dict()
    for number, count in enumerate(counts):
        if number == stop:
            saved = json.loads(json.dumps(stream.state_dict()))
        taken.append(ids(stream.take(count)))
        assert len(set(taken[-1])) == count
    resumed = PromptStream(prompts(size), seed=3, shuffle=shuffle)
    resumed.load_state_dict(saved)
    rest = counts[stop:] if stop < len(counts) else counts
    assert [ids(resumed.take(count)) for count in rest] == (taken[stop:] if stop < len(counts) else taken)


def test_every_epoch_holds_every_prompt_in_another_order() -> None:
    stream = PromptStream(prompts(20), seed=0, shuffle=True)
    epochs = [ids(stream.take(10)) + ids(stream.take(10)) for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]
    assert ids(PromptStream(prompts(20), seed=1, shuffle=True).take(20)) != epochs[0]
    assert ids(PromptStream(prompts(5), seed=0, shuffle=False).take(5)) == [0, 1, 2, 3, 4]


def test_a_prompt_that_comes_up_twice_or_is_excluded_is_next() -> None:
    stream = PromptStream(prompts(4), seed=0, shuffle=False)
    assert ids(stream.take(3)) == [0, 1, 2]
    assert ids(stream.take(3, exclude={"3", "9"})) == [0, 1, 2]
    assert ids(stream.take(2)) == [3, 0]
    with pytest.raises(ValueError, match="4 different prompts are wanted, but only 3 of 4 are free"):
        stream.take(4, exclude={"0"})


def test_a_state_of_other_data_is_refused() -> None:
    state = PromptStream(prompts(4), seed=0, shuffle=True).state_dict()
    with pytest.raises(ValueError, match="content_hash"):
        PromptStream(prompts(5), seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=0, this one 1"):
        PromptStream(prompts(4), seed=1, shuffle=True).load_state_dict(state)
