"""The one way in for text, JSON and YAML. What can't be read is a ValueError that names the file, the line and the fix.

JSON is taken as RFC 8259 has it, and refused where it is ambiguous: a key that stands twice, NaN and Infinity, numbers
of more digits than Python reads, nesting that later steps could not follow, and `\\ud800`, which is no character. A byte
order mark, which some editors write, is skipped.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

MAX_DEPTH = 100
"""Of brackets inside brackets. Everything that walks such trees, pickling for other processes included, recurses."""
MAX_LINE_BYTES = 2**30
MAX_YAML_VALUES = 100_000
"""Aliases counted as often as they are used: nine lines of YAML can stand for a billion values."""
_SHOWN = 80
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

T = TypeVar("T")
FilePath = str | os.PathLike[str]


def read_text(path: FilePath) -> str:
    """A whole file of UTF-8."""
    file = Path(path)
    try:
        with _opened(file) as stream:
            data = stream.read()
    except OSError as error:
        raise ValueError(f"{file} can't be read: {_reason(error)}") from None
    return _decoded(data, file, 1).removeprefix("\ufeff")


def read_lines(path: FilePath) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of a file of UTF-8 that need not fit in memory."""
    file = Path(path)
    try:
        with _opened(file) as lines:
            number = 0
            while data := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES:
                    raise ValueError(f"{file}, line {number} is longer than {MAX_LINE_BYTES:,} bytes; cut it")
                yield number, _decoded(data.removeprefix(_BOM) if number == 1 else data, file, number).rstrip("\r\n")
    except OSError as error:
        raise ValueError(f"{file} can't be read: {_reason(error)}") from None


def read_json(path: FilePath) -> Any:
    return parse_json(read_text(path), str(path))


def read_json_object(path: FilePath) -> dict[str, Any]:
    """A file of one JSON object."""
    return parse_json_object(read_text(path), str(path))


def read_json_as(path: FilePath, kind: type[T]) -> T:
    """A file of one JSON object as a dataclass or a pydantic model, its types checked."""
    return checked(read_json_object(path), kind, str(path))


def checked(fields: Any, kind: type[T], place: str) -> T:
    """Parsed JSON as a dataclass or a pydantic model. ValueError names every key that is missing or of another type."""
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc'])) or 'all of it'} {_found(detail)}, {detail['msg']}"
            for detail in error.errors(include_url=False)
        ]
        raise ValueError(f"{place} is damaged, or another program's: {'; '.join(problems[:5])}") from None


def parse_json(text: str, place: str) -> Any:
    """`place` names the text in errors: the file, or `FILE, line N`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ValueError(f"{place} is not JSON ({error.msg}, {where}): {short(text)}") from None
    except RecursionError:
        raise ValueError(
            f"{place} is nested too deeply; at most {MAX_DEPTH} brackets may stand in each other"
        ) from None
    except ValueError as error:  # From the hooks, or int(), which reads 4,300 digits.
        reason = str(error) if isinstance(error, _Ambiguous) else "holds a number of more digits than can be read"
        raise ValueError(f"{place} {reason}: {short(text)}") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise ValueError(f"{place} is nested too deeply; at most {MAX_DEPTH} brackets may stand in each other")
    if _LONE_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            code = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(f"{place} holds {code} without its pair, which is no character; remove it") from None
    return value


def parse_json_object(text: str, place: str) -> dict[str, Any]:
    fields = parse_json(text, place)
    if not isinstance(fields, dict):
        raise ValueError(f"{place} holds a {type(fields).__name__}, not an object: {short(text)}")
    return fields


def read_yaml(path: FilePath) -> Any:
    """A file of YAML as plain values."""
    text = read_text(path)
    check_yaml(text, str(path))
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None


def check_yaml(text: str, place: str) -> yaml.Node | None:
    """The node at the root, None of an empty text. ValueError when it is no YAML, or more than anyone can mean."""
    too_deep = f"{place} is nested too deeply; at most {MAX_DEPTH} sections may stand in each other"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not valid YAML: {one_line(error)}") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    waiting, count = [(root, 1)] if root is not None else [], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError(too_deep)
        if count > MAX_YAML_VALUES:
            raise ValueError(f"{place} has more than {MAX_YAML_VALUES:,} values, aliases counted; shorten it")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
    return root


def short(text: Any) -> str:
    """As much of it as an error should quote, on one line."""
    line = " ".join(str(text)[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def one_line(error: BaseException) -> str:
    """The message of a library's error, which may take a page, for one line of ours."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 400 else line[:397] + "..."


class _Ambiguous(ValueError):
    """Raised inside of the parser for what readers of JSON disagree on."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Ambiguous(f"has the key {short(twice)!r} twice; remove one")
    return fields


def _refuse_constant(name: str) -> Any:
    raise _Ambiguous(f"holds {name}, which is no JSON; write null or a number")


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner = [part for container in level for part in (container.values() if type(container) is dict else container)]
        level = [part for part in inner if type(part) is dict or type(part) is list]
        if not level:
            return False
    return True


def _decoded(data: bytes, file: Path, first_line: int) -> str:
    if b"\0" in data[:4] or data.startswith(_UTF16):
        raise ValueError(f"{file}, line {first_line} is no text, or not in UTF-8; convert it: iconv -t UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise ValueError(
            f"{file}, line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert it: iconv -f LATIN1 -t UTF-8"
        ) from None


def _opened(file: Path) -> IO[bytes]:
    """A pipe, such as a shell's <(...), is read to its end; one that nobody writes to is empty, and not waited for."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")  # Closes it where it is a directory, which is an OSError.


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _found(detail: Any) -> str:
    return "is missing" if detail["type"] == "missing" else f"is {short(repr(detail['input']))}"
