"""What drpo_megatron/data/quickstart.py makes: a loadable checkpoint, disjoint splits, careless demonstrations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from drpo_megatron.data.jsonl import read_jsonl
from drpo_megatron.data.prompts import read_demonstrations, read_prompts
from drpo_megatron.data.quickstart import make
from drpo_megatron.data.tokenize import decode, encode_demonstration, encode_prompt, load_tokenizer
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "quickstart"
    assert make(out, seed=0)
    return out


def hashes(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_model_is_a_small_qwen3_moe_that_transformers_loads(assets: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(assets / "model")
    assert model.config.model_type == "qwen3_moe"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 2e6
    assert model.config.vocab_size % 2 == 1
    assert not model.config.tie_word_embeddings


def test_the_tokenizer_has_one_token_a_character_and_a_chat_template(assets: Path) -> None:
    tokenizer = load_tokenizer(assets / "model")
    ids = encode_prompt(tokenizer, "3+8+5=")
    assert tokenizer.decode(ids) == "<|user|>3+8+5=<|assistant|>"
    assert len(ids) == 8
    assert decode(tokenizer, encode_demonstration(tokenizer, "16")) == "16"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_splits_are_disjoint_and_their_answers_right(assets: Path) -> None:
    splits = {name: [line for _, line in read_jsonl(assets / f"{name}.jsonl")] for name in ("train", "heldout")}
    assert {name: len(lines) for name, lines in splits.items()} == {"train": 800, "heldout": 200}
    questions = {name: {line["prompt"] for line in lines} for name, lines in splits.items()}
    assert not questions["train"] & questions["heldout"]
    assert {line["prompt"] for _, line in read_jsonl(assets / "warmup.jsonl")} <= questions["train"]
    for line in splits["train"] + splits["heldout"]:
        assert sum(map(int, line["prompt"].rstrip("=").split("+"))) == int(line["answer"])


def test_half_of_the_demonstrations_are_off_by_one(assets: Path) -> None:
    lines = [line for _, line in read_jsonl(assets / "warmup.jsonl")]
    errors = [int(line["response"]) - int(line["answer"]) for line in lines]
    assert set(errors) == {-1, 0, 1}
    assert abs(sum(error == 0 for error in errors) / len(errors) - 0.5) < 0.02


def test_the_readers_take_the_files(assets: Path) -> None:
    config = tiny_config(assets / "model")
    tokenizer = load_tokenizer(assets / "model")
    assert len(read_prompts(assets / "heldout.jsonl", tokenizer, config)) == 200
    assert len(read_demonstrations(assets / "warmup.jsonl", tokenizer, config)) == 12800


def test_the_same_seed_makes_the_same_bytes_and_a_complete_directory_is_left_alone(
    assets: Path, tmp_path: Path
) -> None:
    assert make(tmp_path / "again", seed=0)
    assert hashes(tmp_path / "again") == hashes(assets)
    assert not make(tmp_path / "again", seed=0)
    (tmp_path / "again" / "train.jsonl").unlink()
    assert make(tmp_path / "again", seed=0, force=True)
    assert make(tmp_path / "again", seed=1)
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["seed"] == 1
    assert hashes(tmp_path / "again")["model/model.safetensors"] != hashes(assets)["model/model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_directory_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="was not made by this tool"):
        make(tmp_path, seed=0, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
