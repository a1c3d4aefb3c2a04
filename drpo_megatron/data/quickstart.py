"""Make what the quickstart trains on: a small Qwen3-MoE checkpoint, its tokenizer, and sums with verifiable answers.

    OUT/model/           config.json, model.safetensors (FP32, random), tokenizer with a chat template
    OUT/train.jsonl      {"id", "prompt": "3+8+5=", "answer": "16"}: 800 of the 1000 ordered triples of digits
    OUT/heldout.jsonl    the other 200
    OUT/warmup.jsonl     train prompts with a careless "response": about half of them are off by one
    OUT/manifest.json    what it was made with; written last, so a directory with it is complete

The same seed makes the same files. A complete directory of the same recipe is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from drpo_megatron.files import flush_tree, put_in_place, scratch_name

SPECIAL_TOKENS = ("<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = "0123456789+-*= "
"""With the special tokens 21 in all: odd, so that tensor parallelism has to pad the vocabulary."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MODEL = dict(
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=256,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=192,
    norm_topk_prob=True,
    max_position_embeddings=64,
    rope_theta=10000.0,
    initializer_range=0.05,
    tie_word_embeddings=False,
)
"""Two layers: at this size a layer costs its operators' overhead, not their arithmetic."""

NUM_HELDOUT = 200
DEMONSTRATIONS_PER_PROBLEM = 16
SHARE_WRONG = 0.5
"""Of the demonstrations. A wrong one is one off, either way: the right answer stays the most likely one."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, and the special ones. Everything else is `<|unk|>`."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MODEL["max_position_embeddings"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
        **MODEL,
    )
    return Qwen3MoeForCausalLM(config)


def make_problems(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]], list[dict[str, str]]]:
    """(train, held-out, warm-up) lines. No held-out triple is in the other two."""
    rng = random.Random(seed)
    triples = list(itertools.product(range(10), repeat=3))
    rng.shuffle(triples)

    def lines(split: str, chosen: list[tuple[int, ...]]) -> list[dict[str, str]]:
        return [
            {"id": f"{split}-{i}", "prompt": "+".join(map(str, triple)) + "=", "answer": str(sum(triple))}
            for i, triple in enumerate(chosen)
        ]

    heldout, train = lines("heldout", triples[:NUM_HELDOUT]), lines("train", triples[NUM_HELDOUT:])
    warmup = []
    for round_ in range(DEMONSTRATIONS_PER_PROBLEM):
        for line in rng.sample(train, len(train)):
            response = int(line["answer"])
            if rng.random() < SHARE_WRONG:
                response += rng.choice([-1, 1]) if response else 1
            warmup.append(line | {"id": f"{line['id']}-demo-{round_}", "response": str(response)})
    return train, heldout, warmup


def recipe(seed: int) -> dict[str, Any]:
    """Everything that decides what the files hold."""
    return {
        "seed": seed,
        "model": MODEL,
        "tokens": [*SPECIAL_TOKENS, *CHARACTERS],
        "num_heldout": NUM_HELDOUT,
        "demonstrations_per_problem": DEMONSTRATIONS_PER_PROBLEM,
        "share_wrong": SHARE_WRONG,
        "wrong_by": 1,
    }


def build(directory: Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    make_model(tokenizer, seed).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    for name, lines in zip(("train", "heldout", "warmup"), make_problems(seed), strict=True):
        write_jsonl(directory / f"{name}.jsonl", lines)
    (directory / "manifest.json").write_text(json.dumps(recipe(seed), indent=2) + "\n")


def write_jsonl(path: Path, lines: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make(out: Path, seed: int, force: bool = False) -> bool:
    """Make `out` unless it is complete; True if it was made.

    Raises ValueError if `out` holds something else: only a directory with a manifest of ours is ever replaced.
    """
    manifest = out / "manifest.json"
    if out.exists() and not manifest.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and was not made by this tool (no manifest.json); choose another --out")
    if manifest.exists() and not force and json.loads(manifest.read_text()) == recipe(seed):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = scratch_name(out)
    try:
        build(scratch, seed)
        flush_tree(scratch)
        put_in_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="directory to make")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the split and the demonstrations")
    parser.add_argument("--force", action="store_true", help="make it again even if it is complete")
    arguments = parser.parse_args()
    try:
        made = make(arguments.out, arguments.seed, arguments.force)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {'made' if made else 'complete already'}")
    return 0
