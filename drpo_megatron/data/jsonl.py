"""JSONL in and out, with errors that name file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drpo_megatron.files import writing


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE, line N`, object) of every line that is not blank.

    Raises ValueError if the file is missing or empty, or a line is not a JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist or is not a file; give a JSONL file, one object a line")
    num_objects = 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} is not JSON ({error.msg}, column {error.colno}): {_short(line)}") from error
            if not isinstance(fields, dict):
                raise ValueError(f"{place} is a {type(fields).__name__}, not an object: {_short(line)}")
            num_objects += 1
            yield place, fields
    if not num_objects:
        raise ValueError(f"{file} is empty; give at least one line")


def write_jsonl(path: str | os.PathLike[str], objects: Iterable[dict[str, Any]]) -> None:
    """One object a line, floats exact. The file appears only when it is complete."""
    with writing(path) as out:
        for fields in objects:
            out.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _short(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 80 else line[:77] + "..."
