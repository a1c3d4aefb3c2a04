"""Files that can't be read: each is named with its line and what to do."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from drpo_megatron.data.jsonl import read_jsonl
from drpo_megatron.reading import parse_json, read_json_object, read_text, read_yaml

PACKAGE = Path(__file__).parents[1] / "drpo_megatron"
OTHERS = {
    "reading.py": "is the one reader",
    "planner/built.py": "lines of our own subprocess",
    "doctor/software.py": "the output of a subprocess; what goes wrong becomes a line of the report",
    "doctor/accept/stage.py": "what our own processes wrote a moment ago",
    "doctor/accept/quickstart.py": "the summary of a run that has just ended",
    "doctor/accept/identity.py": "the output of a subprocess",
    "commands/accept.py": "the output of a subprocess",
    "orchestration/run_lock.py": "one that can't be read is a damaged lock, and is treated so",
    "orchestration/run_directory.py": "a summary of our own",
    "data/quickstart.py": "a manifest of our own; a damaged one is written again",
}
"""Where JSON or YAML may be parsed otherwise, and why."""


def test_nothing_else_parses_json_or_yaml() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                if called in ("json.load", "json.loads", "yaml.safe_load", "yaml.load", "OmegaConf.load"):
                    found.append(f"{name}:{node.lineno} {called}")
    assert [place for place in found if place.split(":")[0] not in OTHERS] == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1}\n{"a": ', "line 2 is not JSON (Expecting value, column 7)"),
        (b'{"a": 1}\n\xff\n', "line 2 is not UTF-8 (byte 0xff); convert it: iconv"),
        ('{"a": 1}'.encode("utf-16"), "line 1 is no text, or not in UTF-8"),
        (b'{"a": 1, "a": 2}', "line 1 has the key 'a' twice; remove one"),
        (b'{"a": {"b": 1, "b": 2}}', "line 1 has the key 'b' twice"),
        (b'{"a": NaN}', "line 1 holds NaN, which is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line 1 holds a number of more digits than can be read"),
        (b'{"a": "\\ud800"}', "line 1 holds \\ud800 without its pair"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "line 1 is nested too deeply"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 1 is nested too deeply"),
        (b"[1]", "line 1 holds a list, not an object"),
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, data: bytes, said: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(data)
    with pytest.raises(ValueError) as raised:
        list(read_jsonl(file))
    assert str(raised.value).startswith(str(file)) and said in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_a_byte_order_mark_and_windows_ends_of_lines_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\r\n{"a": "\\ud83d\\ude00"}\r\n')
    assert [fields["a"] for _, fields in read_jsonl(file)] == ["é", "😀"]


def test_depth_is_counted_in_brackets_inside_of_brackets() -> None:
    deep = "[" * 100 + "]" * 100
    assert parse_json(deep, "it") == json.loads(deep)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(f"[{deep}]", "it")
    wide = json.dumps([[1.5] * 10] * 10_000)
    assert parse_json(wide, "it") == json.loads(wide)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "is not valid YAML"),
        ("a: 2026-99-99", "is not valid YAML"),
        ("[" * 5000, "is nested too deeply"),
        ("\n".join(f"{'  ' * i}a:" for i in range(200)), "is nested too deeply"),
        # Nine lines that stand for 9^9 values.
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)), "values"),
        ("a: \x01", "is not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_read_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        read_yaml(file)
    assert str(raised.value).startswith(str(file)) and said in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


def test_what_is_no_file_is_named_with_the_reason(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(ValueError, match=f"^{path} can't be read: {reason}$"):
            read_text(path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json holds a list, not an object"):
        read_json_object(tmp_path / "list.json")
