"""Files of users, broken in every way that a grammar of mutations draws: each is answered in a few lines that name it.

The commands are those that start no process. A defect of ours (a traceback, or exit code 70) fails the test, and so does
anything that a refused command leaves behind. The draws follow from a seed; others are made by
`BROKEN_SEED=1 BROKEN_EXAMPLES=200 python -m pytest tests/test_broken_inputs.py`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from drpo_megatron import cli
from tests.orchestration import command

NUM_EXAMPLES = int(os.environ.get("BROKEN_EXAMPLES", "12"))
SEED = os.environ.get("BROKEN_SEED", "0")
MAX_LINES, MAX_CHARACTERS = 40, 6000
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


@dataclass(frozen=True)
class Case:
    arguments: tuple[str, ...]
    file: str


CASES = [
    Case(("train", "run.yaml", "--dry-run"), "run.yaml"),
    Case(("train", "run.yaml", "--dry-run"), "train.jsonl"),
    Case(("train", "run.yaml", "--dry-run"), "warmup.jsonl"),
    Case(("train", "run.yaml", "--dry-run"), "model/config.json"),
    Case(("train", "run.yaml", "--dry-run"), "model/tokenizer.json"),
    Case(("train", "run.yaml", "--dry-run"), "model/tokenizer_config.json"),
    Case(("train", "run.yaml", "--dry-run"), "model/chat_template.jinja"),
    Case(("train", "run.yaml", "--dry-run"), "model/model.safetensors"),
    Case(("plan", "run.yaml"), "model/config.json"),
    Case(("convert", "inspect", "model"), "model/config.json"),
    Case(("convert", "inspect", "model"), "model/model.safetensors"),
    Case(("convert", "inspect", "sharded"), "sharded/model.safetensors.index.json"),
    Case(("train", "--resume", "old", "--dry-run"), "old/config.yaml"),
    Case(("train", "--resume", "old", "--dry-run"), "old/checkpoints/step_000002/driver.json"),
    Case(("top", "old", "--once"), "old/metrics.jsonl"),
    Case(("top", "old", "--once"), "old/config.yaml"),
    Case(("doctor", "--compare", "reports.jsonl"), "reports.jsonl"),
    Case(("study", "study.yaml", "--dry-run"), "study.yaml"),
    Case(("study", "report", "studied"), "studied/study.json"),
    Case(("study", "report", "studied"), "studied/a/seed-0/cell.json"),
]
IDS = [f"{case.arguments[0]}-{case.file.replace('/', '-')}" for case in CASES]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Valid files of every kind; the current directory."""
    root = tmp_path_factory.mktemp("inputs")
    file = command.prepare(root)
    tree = yaml.safe_load(file.read_text())
    tree["reward"] = {"name": "arithmetic"}  # Another one is tried in a process of its own.
    for name in ("train", "heldout"):  # Answers that this one can read.
        lines = [json.loads(line) | {"answer": "7"} for line in (root / f"{name}.jsonl").read_text().splitlines()]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    file.write_text(yaml.safe_dump(tree))
    shutil.copytree(root / "model", root / "sharded")
    os.replace(root / "sharded/model.safetensors", root / "sharded/model-00001-of-00001.safetensors")
    from safetensors import safe_open

    with safe_open(root / "sharded/model-00001-of-00001.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (root / "sharded/model.safetensors.index.json").write_text(json.dumps(index))
    old = root / "old"
    (old / "checkpoints/step_000002").mkdir(parents=True)
    tree["run"]["run_dir"] = "old"
    (old / "config.yaml").write_text(yaml.safe_dump(tree))
    progress = {"step": 2, "policy_version": 3, "accuracy": {}, "phase_s": {}, "num_trained_tokens": 9, "wall_s": 1.0}
    record = {"progress": progress, "fingerprint": "x", "versions": {}}
    (old / "checkpoints/step_000002/driver.json").write_text(json.dumps(record))
    rows = [{"step": step, "time/step_s": 1.0, "time/train_s": 0.5, "reward/mean": 0.25} for step in range(3)]
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finding = {"name": "torch", "status": "ok", "found": "2.13", "advice": "", "detail": ""}
    reports = [{"node": node, "findings": [finding]} for node in "ab"]
    (root / "reports.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports))
    study = {"name": "small", "base": "run.yaml", "seeds": [0], "axes": {"objective": {"a": {"objective": "pg"}}}}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    (root / "studied/a/seed-0").mkdir(parents=True)
    (root / "studied/study.json").write_text(json.dumps(study))
    cell = {
        "cell": "a",
        "seed": 0,
        "levels": {},
        "overrides": [],
        "code": "c",
        "start": None,
        "versions": {},
        "state": "done",
    }
    (root / "studied/a/seed-0/cell.json").write_text(json.dumps(cell))
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)


def run(arguments: tuple[str, ...]) -> tuple[int, str]:
    """(exit code, stderr) of the command in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    error = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
            try:
                code = cli.main(list(arguments))
            except SystemExit as stop:
                code = int(stop.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, error.getvalue()


# --- the grammar ----------------------------------------------------------------------------------------------------


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
    where = draw.randrange(min(len(data), 4000))
    if kind == "bytes":
        return data[:where] + bytes([draw.randrange(256)]) + data[where + 1 :]
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


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_valid_file_is_not_called_broken(directory: Path, case: Case) -> None:
    """Else the next test would only ever see one message."""
    code, error = run(case.arguments)
    expected = {"old": 2, "studied": 2}.get(case.file.split("/")[0], 0)
    assert code in (0, expected), error


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_broken_file_is_answered_by_name_and_nothing_is_left(directory: Path, case: Case) -> None:
    file = directory / case.file
    original, before = file.read_bytes(), listing(directory)
    found: list[str] = []
    for number in range(NUM_EXAMPLES):
        content = mutated(Random(f"{SEED}/{' '.join(case.arguments)}/{case.file}/{number}"), file)
        try:
            file.write_bytes(content)
            code, error = run(case.arguments)
        finally:
            file.write_bytes(original)
        left = sorted(set(listing(directory)) ^ set(before))
        if problem := fault(case, code, error, left):
            found.append(f"{problem}\n  example {number}: {content[:300]!r}\n  answer {code}: {error[:1500]}")
        for name in left:
            remove(directory / name)
    assert not found, f"{len(found)} of {NUM_EXAMPLES}:\n" + "\n".join(found)


def fault(case: Case, code: int, error: str, left: list[str]) -> str | None:
    """What is wrong with an answer."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in error:
        return "a traceback"
    if left:
        return f"left behind: {left}"
    if code != 2:  # Of a file that can be read, 1 is an answer.
        return None
    if error.count("\n") > MAX_LINES or len(error) > MAX_CHARACTERS:
        return "a long answer"
    file = Path(case.file)
    if not any(name in error for name in (file.name, file.parent.name or file.name, case.arguments[-1])):
        return "the file isn't named"
    return None


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_a_few_of_them_as_real_processes(directory: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(command.ROOT), "OMP_NUM_THREADS": "1"}
    for name, content in (("top", b"[" * 5000), ("doctor", b"\xff\xfe\0\0"), ("study", b"a: 1")):
        file = directory / f"broken-{name}.yaml"
        file.write_bytes(content)
        arguments = {
            "top": ["train", file.name],
            "doctor": ["doctor", "--compare", file.name],
            "study": ["study", file.name],
        }
        done = subprocess.run(
            [sys.executable, "-m", "drpo_megatron.cli", *arguments[name]],
            env=environment,
            capture_output=True,
            text=True,
        )
        file.unlink()
        assert done.returncode == 2 and "Traceback" not in done.stderr and file.name in done.stderr, done.stderr
