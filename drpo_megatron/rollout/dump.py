"""Rollouts as JSONL files, one a step: to read, and to train on again from exactly the same numbers.

DIR/step_000001.jsonl    {"format": 1, "step": 1, "num_groups": 64, "of": {what draws like this: `identity`}}
                         {"prompt": {...}, "completions": [{...}, ...], "rewards": [...]}      a RolloutGroup a line
"""

from __future__ import annotations

import hashlib
import math
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from drpo_megatron.config import Config
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.config.sections import WarmupSection
from drpo_megatron.data.jsonl import read_jsonl, write_jsonl
from drpo_megatron.reading import short
from drpo_megatron.types import Completion, FinishReason, Prompt, RolloutGroup, RoutedExperts

_FORMAT = 1
_MAX_LOGPROB = 1e-3
"""Of a certain token, by rounding: logits of size 1e3 are good to 1e-4 in FP32, and so is their logarithm of a sum."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def rollout_file(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}.jsonl"


def identity(config: Config) -> dict[str, Any]:
    """What two configurations must agree on for one to train on what the other drew, by the name of each, as JSON."""
    directory, rollout = Path(config.model.hf_path), config.rollout
    tokenizer = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            tokenizer.update((directory / name).read_bytes())
    model = {f"model {name}": value for name, value in asdict(read_hf_config(directory)).items()}
    return model | {
        "tokenizer": tokenizer.hexdigest()[:16],
        "warmup": _described(config.warmup) if config.warmup else "none",
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.samples_per_prompt": rollout.samples_per_prompt,
        "rollout.max_response_tokens": rollout.max_response_tokens,
        "rollout.temperature": rollout.temperature,
    }


def _described(warmup: WarmupSection) -> str:
    digest = hashlib.sha256(warmup.model_dump_json().encode()).hexdigest()[:8]
    return f"{warmup.num_steps} steps of {warmup.data} (settings {digest})"


def write_rollout(
    path: str | os.PathLike[str], step: int, groups: Sequence[RolloutGroup], drawn_as: dict[str, Any]
) -> None:
    """Every number is written so that it reads back bit by bit. The file appears when it is complete."""
    head = {"format": _FORMAT, "step": step, "num_groups": len(groups), "of": drawn_as}
    write_jsonl(path, [head, *map(group_to_dict, groups)])


def read_rollout(
    path: str | os.PathLike[str],
    drawn_as: dict[str, Any],
    check: Callable[[RolloutGroup], None] = lambda group: None,
) -> tuple[int, list[RolloutGroup]]:
    """(step, groups) as they were written.

    check: raises ValueError for a group that can't be used.
    Raises: ValueError with file and line for a line that is cut off, lacks a field, contradicts itself or holds numbers
        that nothing draws, for a file that ends too early, and for one whose rollouts were drawn otherwise than
        `drawn_as`, with each difference.
    """
    lines = read_jsonl(path)
    place, head = next(lines)
    if head.get("format") != _FORMAT or not isinstance(head.get("step"), int) or not isinstance(head.get("of"), dict):
        raise ValueError(f"{place} is not the head of a rollout file of format {_FORMAT}; write the dump again")
    differences = [
        f"{name} is {head['of'].get(name)!r} there and {value!r} here"
        for name, value in drawn_as.items()
        if head["of"].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{path} does not fit this run: {'; '.join(differences)}. Train with the configuration that drew it"
        )
    groups = [_checked(group_from_dict(fields, place), place, check) for place, fields in lines]
    if len(groups) != head.get("num_groups"):
        raise ValueError(
            f"{path} has {len(groups)} groups, but its head promises {head.get('num_groups')}: it was cut off; dump it again"
        )
    return head["step"], groups


def group_to_dict(group: RolloutGroup) -> dict[str, Any]:
    """Everything in it, as JSON has it: bytes become base64."""
    fields = asdict(group)
    for completion in fields["completions"]:
        if routed := completion["routed_experts"]:
            routed["data"] = b64encode(routed["data"]).decode()
    return fields


def group_from_dict(fields: dict[str, Any], place: str) -> RolloutGroup:
    """The inverse of `group_to_dict` after a trip through JSON, which knows lists but no tuples."""
    try:
        prompt, completions = fields["prompt"], fields["completions"]
        group = RolloutGroup(
            prompt=Prompt(**prompt | {"token_ids": tuple(prompt["token_ids"])}),
            completions=tuple(Completion(**{name: _read(value) for name, value in c.items()}) for c in completions),
            rewards=tuple(fields["rewards"]),
            reward_metrics=tuple(fields.get("reward_metrics", ())),
        )
        _check_kinds(group)
        _check_lengths(group)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is not a rollout group: {error}") from error
    return group


def _checked(group: RolloutGroup, place: str, check: Callable[[RolloutGroup], None]) -> RolloutGroup:
    try:
        check_numbers(group)
        check(group)
    except ValueError as error:
        raise ValueError(f"{place} (prompt {group.prompt.prompt_id}): {error}") from error
    return group


def check_numbers(group: RolloutGroup, vocab_size: float = math.inf) -> None:
    """Raises: ValueError for token ids that are no ids, log-probs that are none, rewards that are not finite."""
    _check_ids("the prompt", group.prompt.token_ids, vocab_size)
    if not group.completions:
        raise ValueError("it has no completions")
    for index, reward in enumerate(group.rewards):
        if not _is_number(reward) or not math.isfinite(reward):
            raise ValueError(f"reward {index} is {reward!r}; rewards must be finite numbers")
    for index, metrics in enumerate(group.reward_metrics):
        for name, value in metrics.items():
            if not _is_number(value) or not math.isfinite(value):
                raise ValueError(f"metric {name} of reward {index} is {value!r}; metrics must be finite numbers")
    for index, completion in enumerate(group.completions):
        name = f"completion {index}"
        _check_ids(name, completion.token_ids, vocab_size)
        _check_logprobs(name, completion.logprobs)
        for ids, logprobs in zip(completion.topk_ids or (), completion.topk_logprobs or (), strict=True):
            if len(ids) != len(logprobs):
                raise ValueError(f"{name} has {len(ids)} topk_ids and {len(logprobs)} topk_logprobs at one position")
            _check_ids(f"{name}'s topk_ids", ids, vocab_size)
            _check_logprobs(f"{name}'s topk_logprobs", logprobs)
        if completion.routed_experts is not None and completion.token_ids:
            rows = len(group.prompt.token_ids) + len(completion.token_ids) - 1
            if completion.routed_experts.shape[0] != rows:
                raise ValueError(
                    f"{name} has routed experts of {completion.routed_experts.shape[0]} tokens, not {rows}"
                )


def _check_ids(what: str, ids: Sequence[Any], vocab_size: float) -> None:
    for place, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            limit = f"below the vocabulary's {vocab_size}" if math.isfinite(vocab_size) else "from 0 on"
            raise ValueError(f"token {place} of {what} is {token!r}; ids are whole numbers {limit}")


def _check_logprobs(what: str, logprobs: Sequence[Any]) -> None:
    for place, value in enumerate(logprobs):
        if not _is_number(value) or not -math.inf < value <= _MAX_LOGPROB:
            raise ValueError(
                f"log mu {place} of {what} is {value!r}; the log of a probability is a finite number of at most 0"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt_id", "answer", "text"), (str,)),
    **dict.fromkeys(("token_ids", "logprobs", "version_spans"), (tuple,)),
    **dict.fromkeys(("topk_ids", "topk_logprobs"), (tuple, type(None))),
    "metadata": (dict,),
    "policy_version": (int,),
    "routed_experts": (RoutedExperts, type(None)),
}
"""Of the fields of prompts and completions; numbers in them are looked at later."""


def _check_kinds(group: RolloutGroup) -> None:
    for index, metrics in enumerate(group.reward_metrics):
        if not isinstance(metrics, dict):
            raise ValueError(f"reward_metrics of completion {index} are {short(repr(metrics))}")
    for what, part in [("prompt", group.prompt), *((f"completion {i}", c) for i, c in enumerate(group.completions))]:
        for name, kinds in _KINDS.items():
            if hasattr(part, name) and not isinstance(getattr(part, name), kinds):
                raise ValueError(f"{name} of the {what} is {short(repr(getattr(part, name)))}")
    for index, completion in enumerate(group.completions):
        if completion.finish_reason not in get_args(FinishReason):
            raise ValueError(f"finish_reason of completion {index} is {short(repr(completion.finish_reason))}")
        spans = [tuple(map(type, span)) for span in completion.version_spans if isinstance(span, tuple)]
        if spans != [(int, int)] * len(completion.version_spans):
            raise ValueError(f"version_spans of completion {index} are not pairs of numbers")
        for name in ("topk_ids", "topk_logprobs"):
            if not all(isinstance(row, tuple) for row in getattr(completion, name) or ()):
                raise ValueError(f"{name} of completion {index} are not a list a token")


def _check_lengths(group: RolloutGroup) -> None:
    if len(group.rewards) != len(group.completions):
        raise ValueError(f"it has {len(group.completions)} completions and {len(group.rewards)} rewards")
    if group.reward_metrics and len(group.reward_metrics) != len(group.completions):
        raise ValueError(f"it has {len(group.completions)} completions and {len(group.reward_metrics)} reward_metrics")
    for index, completion in enumerate(group.completions):
        for name in ("logprobs", "topk_ids", "topk_logprobs"):
            values = getattr(completion, name)
            if values is not None and len(values) != len(completion.token_ids):
                raise ValueError(
                    f"completion {index} has {len(completion.token_ids)} token_ids and {len(values)} {name}"
                )


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return _routed(tuple(value["shape"]), b64decode(value["data"], validate=True))
    return tuple(map(_read, value)) if isinstance(value, list) else value


def _routed(shape: tuple[Any, ...], data: bytes) -> RoutedExperts:
    if (
        [type(n) for n in shape] != [int] * 3
        or min(shape) < 0
        or len(data) not in (math.prod(shape), 2 * math.prod(shape))
    ):
        raise ValueError(f"routed experts of shape {short(list(shape))} in {len(data)} bytes")
    return RoutedExperts(shape, data)
