"""JSONL in and out, with errors that name file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from drpo_megatron.files import writing
from drpo_megatron.reading import parse_json_object, read_lines


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`FILE, line N`, object) of every line that is not blank.

    Raises ValueError if the file is missing or empty, or a line is not a JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file} does not exist or is not a file; give a JSONL file, one object a line")
    num_objects = 0
    for number, line in read_lines(file):
        if line.strip():
            num_objects += 1
            place = f"{file}, line {number}"
            yield place, parse_json_object(line, place)
    if not num_objects:
        raise ValueError(f"{file} is empty; give at least one line")


def write_jsonl(path: str | os.PathLike[str], objects: Iterable[dict[str, Any]]) -> None:
    """One object a line, floats exact. The file appears only when it is complete."""
    with writing(path) as out:
        for fields in objects:
            out.write(json.dumps(fields, ensure_ascii=False) + "\n")
