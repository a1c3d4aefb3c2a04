"""Files of users, broken in every way that a grammar of mutations draws: each is answered in a few lines that name it.

The commands are those that start no process. A defect of ours (a traceback, or exit code 70) fails the test, and so does
anything that a refused command leaves behind. The draws follow from a seed; others are made by
`BROKEN_SEED=1 BROKEN_EXAMPLES=200 python -m pytest tests/test_broken_inputs.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import yaml

from tests.broken import SEED, listing, mutated, remove, run
from tests.orchestration import command

NUM_EXAMPLES = int(os.environ.get("BROKEN_EXAMPLES", "12"))
MAX_LINES, MAX_CHARACTERS = 40, 6000


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
    if file.suffix == ".yaml" and re.search(r"\b(data|model|run|rollout|reward|trainer|warmup)\.\w+", error):
        return None  # By its key, where the file is fine and what a key of it names is not.
    if not any(name in error for name in (file.name, file.parent.name or file.name, case.arguments[-1])):
        return "the file isn't named"
    return None


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
