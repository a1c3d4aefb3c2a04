"""What is wrong with a configuration, in words: the place, the key, the value, what was expected, the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from drpo_megatron.config.schema import known_keys, sections_at, tags, type_text
from drpo_megatron.config.sections import Config
from drpo_megatron.reading import short

KeyPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the values came from, so that an error can point at it."""

    file: Path
    lines: dict[KeyPath, int]
    overrides: dict[KeyPath, str]

    def of(self, path: KeyPath) -> str:
        """`override a.b=c` or `file:line`, of the key or of the innermost section that holds it."""
        prefixes = [path[:length] for length in range(len(path), 0, -1)]
        for prefix in prefixes:
            if prefix in self.overrides:
                return f"override {short(self.overrides[prefix])}"
        for prefix in prefixes:
            if prefix in self.lines:
                return f"{self.file}:{self.lines[prefix]}"
        return str(self.file)


def listed(title: str, problems: Sequence[str]) -> str:
    """One message for several problems: a title that counts them, and a line each."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  - ".join([f"{title}: {count}", *problems])


def problem_text(detail: ErrorDetails, source: Source) -> str:
    path, section = _locate(detail["loc"])
    key, given = ".".join(path), short(repr(detail["input"]))
    where = source.of(path)
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key {key} = {given}{_nearest_key(path, section)}"
    if detail["type"] == "missing":
        return f"{where}: {key} is missing{_what_to_write(path, section)}"
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found", "literal_error"):
        return f"{where}: {_bad_choice(path, detail)}"
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: {key} = {given}; expected a section with keys"
    if detail["type"] == "value_error":
        return f"{where}: {key or 'configuration'}: {detail['ctx']['error']}"
    expected = detail["msg"].removeprefix("Input should be ").partition(", unable to parse")[0]
    return f"{where}: {key} = {given}; expected {expected}"


def _locate(location: tuple[int | str, ...]) -> tuple[KeyPath, type[BaseModel] | None]:
    """The key path of an error without the union's tags, and the section class that holds (or lacks) its last key."""
    path: KeyPath = ()
    holder: type[BaseModel] | None = Config
    options: list[type[BaseModel]] = []
    for part in location:
        chosen = [option for option in options if len(options) > 1 and part in tags(option)]
        if chosen:
            holder, options = chosen[0], []
            continue
        if options:
            holder = options[0]
        path = (*path, str(part))
        options = sections_at(path)
    return path, holder


def _nearest_key(path: KeyPath, section: type[BaseModel] | None) -> str:
    siblings = list(section.model_fields) if section is not None else []
    prefix = "".join(f"{key}." for key in path[:-1])
    if near := difflib.get_close_matches(path[-1], siblings, n=1):
        return f"; did you mean {prefix}{near[0]}?"
    elsewhere = [known for known in known_keys() if known.rsplit(".", 1)[-1] == path[-1] and known != ".".join(path)]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    chosen = f" with name {tags(section)[0]}" if section is not None and tags(section) else ""
    return f"; known keys of {'.'.join(path[:-1]) or 'the file'}{chosen}: {', '.join(siblings)}"


def _what_to_write(path: KeyPath, section: type[BaseModel] | None) -> str:
    if section is None or path[-1] not in section.model_fields:
        return ""
    field = section.model_fields[path[-1]]
    help_text = f": {' '.join(field.description.split())}" if field.description else ""
    if chosen_by := tags(section):
        example = ", ".join([f"name: {chosen_by[0]}", f"{path[-1]}: ..."])
        return f" ({type_text(field)}){help_text} Example: {'.'.join(path[:-1])}={{{example}}}"
    if sections_at(path):
        return f" (a section){help_text}"
    return f" ({type_text(field)}){help_text}"


def _bad_choice(path: KeyPath, detail: ErrorDetails) -> str:
    options = sections_at(path)
    given = detail["input"]
    if options:
        choices = [tag for option in options for tag in tags(option)]
        if isinstance(given, dict):
            given = given.get("name")
        path = (*path, "name")
    else:
        choices = [str(choice) for section in sections_at(path[:-1]) for choice in _literal_choices(section, path[-1])]
    key = ".".join(path)
    near = difflib.get_close_matches(str(given), choices, n=1)
    suggestion = f"; did you mean {near[0]}?" if near else ""
    given_text = f"{key} is missing" if given is None else f"{key} = {short(repr(given))}"
    return f"{given_text}; expected one of {', '.join(choices)}{suggestion}"


def _literal_choices(section: type[BaseModel], name: str) -> list[str]:
    field = section.model_fields.get(name)
    return type_text(field).split(" | ") if field is not None else []
