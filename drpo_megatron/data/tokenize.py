"""The only way from text to token ids and back: every prompt goes through the tokenizer's chat template here."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from drpo_megatron.reading import one_line, read_json_object, short

_TEMPLATE_S = 20.0
"""A template takes a millisecond."""


def read_tokenizer(hf_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint, whatever it lacks. ValueError if it cannot be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True, trust_remote_code=False)
        tokenizer.decode(tokenizer("1 + 1").input_ids)  # Values of odd types are only used then.
        return tokenizer
    except Exception as error:  # What the libraries raise over an odd tokenizer.json: KeyError, TypeError, Exception.
        raise ValueError(
            f"no tokenizer can be read from {hf_path}: {type(error).__name__}: {one_line(error)}"
        ) from error


def load_tokenizer(hf_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint. ValueError if it cannot be read, or has no chat template or no EOS."""
    tokenizer = read_tokenizer(hf_path)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer in {hf_path} has no chat template; add chat_template.jinja to the checkpoint")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {hf_path} has no EOS token; set eos_token in tokenizer_config.json")
    if (config_file := Path(hf_path) / "config.json").is_file():
        _check_vocabulary(tokenizer, config_file)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config_file: Path) -> None:
    """Every token has its row in the embedding."""
    fields = read_json_object(config_file)
    text_config = fields.get("text_config")
    size = (text_config if isinstance(text_config, dict) else fields).get("vocab_size")
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=lambda name: vocabulary[name], default=None)
    if isinstance(size, int) and token is not None and vocabulary[token] >= size:
        raise ValueError(
            f"the tokenizer in {config_file.parent} has the token {short(token)!r} with id {vocabulary[token]}, and "
            f"{config_file} says vocab_size={size}; they are of different models: copy both again"
        )


def check_template(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
    """That the chat template can be applied, ends, and holds what it is given, on a problem that nobody has.

    Raises: ValueError in one line.
    """
    with _time_limit(f"{_named(tokenizer)} does not end within {_TEMPLATE_S:g} s; mend it"):
        first, second = (_applied(tokenizer, question, system_prompt) for question in ("What is 1 + 1?", "And 2 + 2?"))
        bare = _applied(tokenizer, "What is 1 + 1?", None) if system_prompt else None
    if first == second:
        raise ValueError(
            f"{_named(tokenizer)} makes {first[:80]!r} of any question: it leaves the question out; mend it"
        )
    if first == bare:
        raise ValueError(f"{_named(tokenizer)} leaves out data.system_prompt; leave data.system_prompt out, or mend it")


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None = None
) -> tuple[int, ...]:
    """Chat template with the generation prompt at the end: exactly what the engine continues.

    Raises: ValueError in one line for a template that refuses the messages or is broken, and when no token comes out.
    """
    text = _applied(tokenizer, question, system_prompt)
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise ValueError(f"{_named(tokenizer)} makes no token of the question {question[:80]!r}; mend it")
    return token_ids


def _applied(tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None) -> str:
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages.append({"role": "user", "content": question})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TimeoutError:
        raise
    except Exception as error:  # A template is a program of somebody else's, and raises anything.
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
        fix = "mend it, or leave data.system_prompt out" if system_prompt else "mend it"
        raise ValueError(f"{_named(tokenizer)} can't be applied ({reason}); {fix}") from error


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of the tokenizer in {tokenizer.name_or_path}"


@contextmanager
def _time_limit(message: str) -> Iterator[None]:
    """ValueError after _TEMPLATE_S. Only the main thread gets alarms; elsewhere nothing limits the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _TEMPLATE_S)
    try:
        yield
    except TimeoutError:
        raise ValueError(message) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, response: str) -> tuple[int, ...]:
    """A response as the policy should draw it: its own tokens, then EOS.

    It is encoded apart from the prompt, because sampled tokens never merge with those of the prompt either.
    """
    return (*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text without special tokens: what rewards read."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
