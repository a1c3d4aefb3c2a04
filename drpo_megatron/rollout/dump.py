"""A rollout as a JSONL file: to read, and to train on again from exactly the same numbers.

The first line is {"step": ...}; each further line is one RolloutGroup.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from drpo_megatron.data.jsonl import read_jsonl, write_jsonl
from drpo_megatron.types import Completion, Prompt, RolloutGroup


def write_rollout(path: str | os.PathLike[str], step: int, groups: Sequence[RolloutGroup]) -> None:
    """Every number is written so that it reads back bit by bit. The file appears when it is complete."""
    write_jsonl(path, [{"step": step}, *map(asdict, groups)])


def read_rollout(path: str | os.PathLike[str]) -> tuple[int, list[RolloutGroup]]:
    """(step, groups) as they were written. Raises ValueError with file and line for anything else."""
    lines = read_jsonl(path)
    place, head = next(lines)
    if not isinstance(head.get("step"), int):
        raise ValueError(f"{place} is not the head of a rollout file: it has no integer 'step'")
    return head["step"], [group_from_dict(fields, place) for place, fields in lines]


def group_from_dict(fields: dict[str, Any], place: str) -> RolloutGroup:
    """The inverse of `dataclasses.asdict` after a trip through JSON, which knows lists but no tuples."""
    try:
        prompt, completions = fields["prompt"], fields["completions"]
        return RolloutGroup(
            prompt=Prompt(**prompt | {"token_ids": tuple(prompt["token_ids"])}),
            completions=tuple(Completion(**{name: _tuples(value) for name, value in c.items()}) for c in completions),
            rewards=tuple(fields["rewards"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is not a rollout group: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
