"""The only way from text to token ids and back: every prompt goes through the tokenizer's chat template here."""

from __future__ import annotations

import os
from collections.abc import Sequence

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(hf_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint. ValueError if it cannot be read, or has no chat template or no EOS."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer can be read from {hf_path}: {error}") from error
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {hf_path} has no chat template; add chat_template.jinja to the checkpoint")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {hf_path} has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None = None
) -> tuple[int, ...]:
    """Chat template with the generation prompt at the end: exactly what the engine continues."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, response: str) -> tuple[int, ...]:
    """A response as the policy should draw it: its own tokens, then EOS.

    It is encoded apart from the prompt, because sampled tokens never merge with those of the prompt either.
    """
    return (*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text without special tokens: what rewards read."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
