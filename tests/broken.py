"""The grammar of broken files and directories, and how the command line is run on them in this process."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from drpo_megatron import cli

SEED = os.environ.get("BROKEN_SEED", "0")
LIMIT_S = int(os.environ.get("BROKEN_LIMIT_S", "300"))
"""A command that hangs (on a pipe, in a circle of links) is ended after that, and the test with it."""
EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**70), 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"),
    "", " ", "x", "nan", "1e999", "..", "../../etc", "/etc/passwd", "a\nb", "a\0b", "\ud800", "\u202e", "x" * 5000,
    "${run.name}", "${a.b}", "${oc.env:HOME}", "???", [], {}, [[]], [None], {"": None}, {"name": []}, [1, "a", {}],
    {"a": {"b": {"c": 1}}},
)  # fmt: skip
RAW: tuple[bytes, ...] = (
    b"", b" ", b"\n\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b"3", b'"text"', b"NaN", b"{", b"[" * 5000,
    b'{"a":' * 3000, b"- " * 3000, b"9" * 5000, b'{"a": 1, "a": 2}', b"&a [*a]", b"a: !!python/object/apply:os.system [ls]",
    b"\x80\x04\x95", b"PK\x03\x04", b'"\\ud800"', b"a: 2026-99-99", b"\x7fELF" + b"\0" * 100,
)  # fmt: skip
BESIDE: tuple[bytes, ...] = (
    b"model.safetensors", b"model.safetensors.index.json", b"pytorch_model.bin", b"adapter_config.json", b"tensors.json",
    b"chat_template.jinja", b"generation_config.json", b"special_tokens_map.json", b"added_tokens.json", b"strange.safetensors",
    b"a\nb", b"\xff\xfe", b"x" * 255, b" ", b".hidden", b"config.yaml", b"metadata.json", b"common.pt", b"checksums.json",
    b"latest_checkpointed_iteration.txt", b"trainer.json", b"step_000003", b"__9_0.distcp", b"hf_quant_config.json",
)  # fmt: skip
"""Names of files that may lie beside others; some of them mean something there."""


class Hangs(BaseException):
    """Nothing in the product catches it."""


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """(exit code, stderr, and stdout where that holds a traceback) of the command in this process."""
    code, output, error = answer(arguments)
    return code, error + (output if "Traceback" in output else "")


def answer(arguments: Sequence[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    output, error = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            try:
                code = cli.main(list(arguments))
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue(), error.getvalue()


def _end(signum: int, frame: Any) -> None:
    raise Hangs(f"no answer in {LIMIT_S} s")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree, the root's included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:8]):
            yield from places(inner, (*path, index))


def changed(tree: Any, path: tuple[Any, ...], change: str, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    if not path:
        return value
    holder = tree
    for part in path[:-1]:
        holder = holder[part]
    if change == "replace":
        holder[path[-1]] = value
    elif change == "remove":
        del holder[path[-1]]
    elif change == "wrap":
        holder[path[-1]] = [holder[path[-1]]]
    elif isinstance(holder, dict):
        holder["unknown"] = value
    return tree


def dumped(tree: Any, suffix: str) -> bytes:
    if suffix == ".yaml":
        return yaml.safe_dump(tree, allow_unicode=False).encode("utf-8", "surrogatepass")
    return json.dumps(tree).encode()


def mutated(draw: Random, file: Path) -> bytes:
    data = file.read_bytes()
    kind = draw.choice(["tree", "tree", "tree", "bytes", "cut", "raw", "insert"])
    if kind == "raw":
        return draw.choice(RAW)
    if kind == "cut":
        return data[: draw.randrange(len(data))]
    where = draw.randrange(draw.choice([min(len(data), 4000), len(data)]))
    if kind == "bytes":
        return data[:where] + bytes([draw.randrange(256)]) + data[where + 1 :]
    if file.suffix == ".safetensors" and kind == "tree":
        return _with_header(data, draw)
    if kind == "insert" or file.suffix not in (".yaml", ".json", ".jsonl"):
        return data[:where] + draw.choice(RAW) + data[where:]
    change, value = draw.choice(["replace", "replace", "remove", "wrap", "add"]), draw.choice(EXTREMES)
    if file.suffix == ".jsonl":
        lines = data.decode().splitlines()
        number = draw.randrange(len(lines))
        tree = json.loads(lines[number])
        lines[number] = json.dumps(changed(tree, draw.choice(list(places(tree))), change, value))
        return "\n".join(lines).encode()
    tree = yaml.safe_load(data) if file.suffix == ".yaml" else json.loads(data)
    return dumped(changed(tree, draw.choice(list(places(tree))), change, value), file.suffix)


def _with_header(data: bytes, draw: Random) -> bytes:
    """A file of safetensors whose header says something else, of the right length."""
    (length,) = struct.unpack("<Q", data[:8])
    tree = json.loads(data[8 : 8 + length])
    change, value = draw.choice(["replace", "replace", "remove", "wrap", "add"]), draw.choice(EXTREMES)
    text = json.dumps(changed(tree, draw.choice(list(places(tree))), change, value)).encode()
    return struct.pack("<Q", draw.choice([len(text), len(text), len(text), length, 2**62])) + text + data[8 + length :]


@contextlib.contextmanager
def broken(draw: Random, path: Path) -> Iterator[str]:
    """In the block a file is broken, gone, or no file at all, or something strange lies beside it. Says what."""
    kind = draw.choice(
        ["content"] * 8 + ["empty", "gone", "folder", "nowhere", "circle", "above", "pipe", "beside", "beside"]
    )
    if kind == "beside":
        name, content = draw.choice(BESIDE), draw.choice(RAW)
        other = Path(os.fsdecode(os.path.join(os.fsencode(path.parent), name)))
        if os.path.lexists(other):
            other = path.parent / "strange"
        other.write_bytes(content)
        try:
            yield f"{other.name!r} beside it: {content[:100]!r}"
        finally:
            other.unlink()
        return
    content = mutated(draw, path) if kind == "content" else b""
    aside = path.parent.parent / f"{path.name}.aside"
    os.rename(path, aside)
    try:
        if kind in ("content", "empty"):
            path.write_bytes(content)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "gone":
            path.symlink_to({"nowhere": "nothing-here", "circle": path.name, "above": ".."}[kind])
        yield f"{kind} {content[:300]!r}" if kind == "content" else kind
    finally:
        if os.path.lexists(path):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        os.rename(aside, path)


def state(root: Path) -> dict[str, tuple[int, int]]:
    """Everything in a directory, with size and time of the last change of files."""
    found = {}
    for path in root.rglob("*"):
        if "__pycache__" not in path.parts:
            status = path.lstat()
            found[str(path.relative_to(root))] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in path.parts)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
