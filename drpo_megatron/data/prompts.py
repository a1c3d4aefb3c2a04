"""Prompts and demonstrations from JSONL files, and the endless, resumable stream that training draws prompts from."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from drpo_megatron.config.sections import Config
from drpo_megatron.data.jsonl import read_jsonl
from drpo_megatron.data.tokenize import encode_demonstration, encode_prompt
from drpo_megatron.reading import short
from drpo_megatron.types import Prompt, Sample

_NUM_NAMED = 10
"""How many too long prompts an error names."""


def read_prompts(path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Prompt]:
    """The problems of a JSONL file, in its order, tokenised by the chat template.

    A line holds `data.prompt_field`, `data.answer_field` and perhaps `id` (else `<file stem>-<line's place>`); what
    else it holds becomes `metadata`. Raises ValueError with file and line for a missing or empty file, a line that is
    not a JSON object, a field that is missing or no text and an id used twice; and lists the prompts that are too long.
    """
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    prompt_field, answer_field = config.data.prompt_field, config.data.answer_field
    for place, fields in read_jsonl(path):
        question = _text(fields, prompt_field, place, "data.prompt_field")
        answer = _text(fields, answer_field, place, "data.answer_field")
        prompt_id = _id(fields, place, f"{Path(path).stem}-{len(prompts)}")
        if prompt_id in places:
            raise ValueError(
                f"{place}: id {short(prompt_id)!r} was used before, at {places[prompt_id]}; ids must be unique"
            )
        places[prompt_id] = place
        prompts.append(
            Prompt(
                prompt_id=prompt_id,
                token_ids=_encoded(place, tokenizer, question, config),
                answer=answer,
                text=question,
                metadata={k: v for k, v in fields.items() if k not in ("id", prompt_field, answer_field)},
            )
        )
    limit, reason = _max_prompt_tokens(config)
    _refuse_longer(((p.prompt_id, len(p.token_ids)) for p in prompts), limit, f"prompts of {path}", reason)
    return prompts


def read_demonstrations(
    path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[Sample]:
    """Supervised samples from a JSONL file with the prompt field and `response`; EOS is added.

    They have the advantage 1, and behaviour log-probs of 0, which the supervised objective does not read. Errors are
    those of `read_prompts`; prompt and response together must fit the model's context.
    """
    samples: list[Sample] = []
    for place, fields in read_jsonl(path):
        response_ids = encode_demonstration(tokenizer, _text(fields, "response", place))
        question = _text(fields, config.data.prompt_field, place)
        samples.append(
            Sample(
                sample_id=f"{Path(path).stem}-{len(samples)}",
                prompt_ids=_encoded(place, tokenizer, question, config),
                response_ids=response_ids,
                behavior_logprobs=(0.0,) * len(response_ids),
                advantage=1.0,
            )
        )
    context = _model_context(config)
    _refuse_longer(
        ((s.sample_id, s.num_tokens) for s in samples), context, f"demonstrations of {path}", "the model's context"
    )
    return samples


class PromptStream:
    """An endless stream of prompts. Every prompt comes once an epoch, in an order that follows from seed and epoch.

    Example:
        stream = PromptStream(prompts, seed=0, shuffle=True)
        stream.take(32)
        stream.load_state_dict(saved)  # continues where `saved = stream.state_dict()` was made
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = list(prompts), seed, shuffle
        self._epoch, self._position = 0, 0
        self._deferred: list[int] = []
        """Places of prompts that came up when they were not wanted; they are the next to be taken."""
        self._order = self._order_of(0)

    def take(self, count: int, exclude: Collection[str] = ()) -> list[Prompt]:
        """The next `count` prompts, all different and none of the `exclude`d ids.

        A prompt that comes up twice where two epochs meet, or is excluded, is kept for the next call. Raises
        ValueError if there are not so many prompts.
        """
        num_free = len(self._prompts) - sum(prompt.prompt_id in exclude for prompt in self._prompts)
        if count > num_free:
            raise ValueError(
                f"{count} different prompts are wanted, but only {num_free} of {len(self._prompts)} are free; lower "
                "rollout.prompts_per_step or give more prompts"
            )
        chosen: dict[int, Prompt] = {}
        waiting, self._deferred = self._deferred, []
        while len(chosen) < count:
            place = waiting.pop(0) if waiting else self._next()
            prompt = self._prompts[place]
            if place in chosen or prompt.prompt_id in exclude:
                self._deferred.append(place)
            else:
                chosen[place] = prompt
        self._deferred += waiting
        return list(chosen.values())

    def state_dict(self) -> dict[str, Any]:
        """A place in the stream, as JSON."""
        return self._identity() | {
            "epoch": self._epoch,
            "position": self._position,
            "deferred": list(self._deferred),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved place. Raises ValueError if it was saved with other prompts, seed or shuffling."""
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise ValueError(
                    f"the saved prompt stream has {name}={state[name]!r}, this one {mine!r}; resume with the data file "
                    "and seed that the run began with"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._deferred = list(state["deferred"])
        self._order = self._order_of(self._epoch)

    def _identity(self) -> dict[str, Any]:
        return {"content_hash": content_hash(self._prompts), "seed": self._seed, "shuffle": self._shuffle}

    def _next(self) -> int:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        self._position += 1
        return self._order[self._position - 1]

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def content_hash(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over ids, tokens and answers: equal exactly when training on them is."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.answer]).encode())
    return digest.hexdigest()


def _encoded(place: str, tokenizer: PreTrainedTokenizerBase, question: str, config: Config) -> tuple[int, ...]:
    try:
        return encode_prompt(tokenizer, question, config.data.system_prompt)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _text(fields: dict[str, Any], name: str, place: str, key: str | None = None) -> str:
    """`key` is that of the configuration which gives the name."""
    if name not in fields:
        there = short(", ".join(fields)) or "none"
        named = f"; {key} says which is read" if key else ""
        raise ValueError(f"{place} has no field {short(repr(name))}; it has: {there}{named}")
    value = fields[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip() or value in ("nan", "inf", "-inf"):
        raise ValueError(f"{place}: field {name!r} is {short(repr(value))}; it must be text that is not empty")
    return value


def _id(fields: dict[str, Any], place: str, otherwise: str) -> str:
    value = fields.get("id", otherwise)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{place}: id is {short(repr(value))}; give a text or a whole number, or leave it out")
    return str(value)


def _model_context(config: Config) -> int:
    hf_config = AutoConfig.from_pretrained(config.model.hf_path, local_files_only=True, trust_remote_code=False)
    return hf_config.get_text_config().max_position_embeddings


def _max_prompt_tokens(config: Config) -> tuple[int, str]:
    context, response = _model_context(config), config.rollout.max_response_tokens
    room = context - response
    if config.data.max_prompt_tokens is not None and config.data.max_prompt_tokens <= room:
        return config.data.max_prompt_tokens, "data.max_prompt_tokens"
    return room, f"the model's context of {context} minus rollout.max_response_tokens={response}"


def _refuse_longer(lengths: Iterable[tuple[str, int]], limit: int, what: str, reason: str) -> None:
    longer = [f"{name} ({size})" for name, size in lengths if size > limit]
    if longer:
        more = f" and {len(longer) - _NUM_NAMED} more" if len(longer) > _NUM_NAMED else ""
        raise ValueError(
            f"{len(longer)} {what} have more than {limit} tokens, {reason}: {', '.join(longer[:_NUM_NAMED])}{more}; "
            "remove or shorten them"
        )
