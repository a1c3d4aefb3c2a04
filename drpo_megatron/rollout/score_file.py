"""Scores on disk as they are made, so that a long evaluation that was killed goes on where it stopped.

A JSONL file: what was evaluated and how in its first line, then a line a problem. A last line that was cut off is
dropped, and its problem done again.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drpo_megatron.files import write_text
from drpo_megatron.reading import checked, parse_json_object, read_text, short
from drpo_megatron.rollout.evaluation import ProblemScores


class ScoreFile:
    """`done` holds what an earlier evaluation left, by prompt id; `append` adds to it and to the file."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """`settings` is all that the scores depend on.

        Raises ValueError if the file holds another evaluation, naming what differs, or is no score file.
        """
        self.path = path
        self.done: dict[str, ProblemScores] = {}
        lines = _whole_lines(path)
        if lines:
            self._check(lines[0], settings)
            self._read(lines[1:])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({"settings": settings})]
        write_text(path, "".join(f"{line}\n" for line in lines))

    def append(self, problem: ProblemScores) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(problem)) + "\n")
        self.done[problem.prompt_id] = problem

    def _check(self, head: str, settings: dict[str, Any]) -> None:
        try:
            found = parse_json_object(head, "its first line").get("settings")
        except ValueError as error:
            raise ValueError(f"{self.path} is no file of scores ({error}); give another --out") from None
        if not isinstance(found, dict):
            raise ValueError(f"{self.path} is no file of scores: its first line has no settings; give another --out")
        for name, wanted in settings.items():
            if found.get(name) != wanted:
                raise ValueError(
                    f"{self.path} holds scores with {name}={short(repr(found.get(name)))}, not {short(repr(wanted))}; give "
                    "another --out, or remove it"
                )

    def _read(self, lines: list[str]) -> None:
        for number, line in enumerate(lines, start=2):
            place = f"{self.path}, line {number}"
            problem = checked(parse_json_object(line, place), ProblemScores, place)
            self.done[problem.prompt_id] = problem


def _whole_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    *whole, _ = read_text(path).split("\n")
    return whole
