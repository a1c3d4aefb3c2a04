"""Rollouts as JSONL files, one a step: to read, and to train on again from exactly the same numbers.

DIR/step_000001.jsonl    {"format": 1, "step": 1, "num_groups": 64, "of": {what draws like this: `identity`}}
                         {"prompt": {...}, "completions": [{...}, ...], "rewards": [...]}      a RolloutGroup a line
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drpo_megatron.config import Config
from drpo_megatron.config.hf_config import read_hf_config
from drpo_megatron.config.sections import WarmupSection
from drpo_megatron.data.jsonl import read_jsonl, write_jsonl
from drpo_megatron.types import Completion, Prompt, RolloutGroup, RoutedExperts

_FORMAT = 1
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


def read_rollout(path: str | os.PathLike[str], drawn_as: dict[str, Any]) -> tuple[int, list[RolloutGroup]]:
    """(step, groups) as they were written.

    Raises: ValueError with file and line for a line that is cut off, lacks a field or contradicts itself, for a file
        that ends too early, and for one whose rollouts were drawn otherwise than `drawn_as`, with each difference.
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
    groups = [group_from_dict(fields, place) for place, fields in lines]
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
        )
        _check_lengths(group)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} is not a rollout group: {error}") from error
    return group


def _check_lengths(group: RolloutGroup) -> None:
    if len(group.rewards) != len(group.completions):
        raise ValueError(f"it has {len(group.completions)} completions and {len(group.rewards)} rewards")
    for index, completion in enumerate(group.completions):
        for name in ("logprobs", "topk_ids", "topk_logprobs"):
            values = getattr(completion, name)
            if values is not None and len(values) != len(completion.token_ids):
                raise ValueError(
                    f"completion {index} has {len(completion.token_ids)} token_ids and {len(values)} {name}"
                )


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return RoutedExperts(tuple(value["shape"]), b64decode(value["data"], validate=True))
    return tuple(map(_read, value)) if isinstance(value, list) else value
