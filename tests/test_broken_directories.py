"""Directories of users, broken in every way that a grammar draws, given to the commands that read them.

A file in them holds something else, is empty, gone, a folder, a pipe, a link to nothing, to itself or upwards, or has
something strange beside it. Asserted: an exit code that the docs name, a few lines that name the place, no traceback,
inputs as they were, nothing half-made. What `convert` accepts comes back as it was. The draws follow from a seed, which
is printed; others are made by `BROKEN_SEED=1 BROKEN_EXAMPLES=200 python -m pytest tests/test_broken_directories.py`.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import yaml

from drpo_megatron.config import load_config
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.orchestration import roll_out
from drpo_megatron.rollout.dump import identity, rollout_file, write_rollout
from drpo_megatron.types import Completion, Prompt, RolloutGroup
from tests.broken import SEED, answer, broken, remove, state
from tests.checkpoint.test_convert import shard
from tests.orchestration import command

NUM_EXAMPLES = int(os.environ.get("BROKEN_EXAMPLES", "10"))
MAX_LINES, MAX_CHARACTERS = 40, 6000
NEW = ("new", "drawn", "scores.jsonl")
"""What the commands may make when they end with 0."""


@dataclass(frozen=True)
class Case:
    arguments: str
    place: str
    """A file, or a directory of which any file is broken."""
    expected: int = 0
    """Exit code while nothing is broken."""


_EVAL = "--reward arithmetic --max-response-tokens 2"
CASES = [
    Case("convert hf-to-megatron --hf model --out new", "model"),
    Case("convert hf-to-megatron --hf sharded --out new --dtype bf16", "sharded"),
    Case("convert megatron-to-hf --megatron megatron --out new", "megatron"),
    Case("convert megatron-to-hf --megatron megatron --out new --skip-checksums", "megatron"),
    Case("convert megatron-to-hf --megatron bare --hf model --out new --max-shard-size 20KB", "bare"),
    Case("convert megatron-to-hf --megatron bare --hf sharded --out new --fp8 block128", "sharded"),
    Case("convert megatron-to-hf --megatron foreign --hf model --out new --experts fused", "foreign"),
    Case("convert verify --hf model --megatron megatron", "model"),
    Case("convert verify --hf model --megatron megatron --skip-checksums", "megatron"),
    Case("convert verify --hf model --megatron bare --logits --prompt t1_t2_t3", "model"),
    Case("convert inspect megatron", "megatron"),
    Case("convert inspect sharded", "sharded"),
    Case("convert inspect old", "old"),
    Case(f"eval model --prompts heldout.jsonl {_EVAL} --out scores.jsonl", "model"),
    Case(f"eval model --prompts heldout.jsonl {_EVAL}", "heldout.jsonl"),
    Case(f"eval model --prompts heldout.jsonl {_EVAL} --out kept.jsonl", "kept.jsonl"),
    Case("eval old --samples 1 --json", "old/hf"),
    Case("eval old --samples 1", "old/config.yaml"),
    Case("rollout run.yaml --out drawn --steps 1", "run.yaml"),
    Case("rollout run.yaml --out drawn --steps 1", "model"),
    Case("slurm submit run.yaml --nodes 1 --gpus-per-node 0 --dry-run", "run.yaml"),
    Case("slurm submit run.yaml --nodes 2 --gpus-per-node 8 --assume-shared --dry-run trainer.backend=gpu", "model"),
    Case("slurm submit --resume old --nodes 1 --gpus-per-node 0 --dry-run", "old/config.yaml"),
    Case("train --resume old --dry-run", "old/checkpoints"),
    Case("train run.yaml --dry-run --from-dump dump", "dump"),
    Case("train run.yaml --dry-run", "model"),
    Case("plan run.yaml --json", "model"),
    Case("top old --once", "old"),
    Case("study study.yaml --dry-run --runs studied", "study.yaml"),
    Case("study report studied", "studied", expected=2),
]
IDS = [
    f"{number}-{'-'.join(case.arguments.split()[:2])}-{case.place}".replace("/", "-")
    for number, case in enumerate(CASES)
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Valid directories of every kind; the current directory."""
    root = tmp_path_factory.mktemp("outer") / "inputs"
    root.mkdir()
    print(f"BROKEN_SEED={SEED}")
    file = command.prepare(root)
    tree = yaml.safe_load(file.read_text())
    tree["reward"] = {"name": "arithmetic"}
    for name in ("train", "heldout"):
        lines = [json.loads(line) | {"answer": "7"} for line in (root / f"{name}.jsonl").read_text().splitlines()]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines[: 16 if name == "train" else 2])))
    file.write_text(yaml.safe_dump(tree))
    shutil.copytree(root / "model", root / "sharded")
    shard(root / "sharded", 2)
    hf_to_megatron(root / "model", root / "megatron", say=lambda text: None)
    shutil.copytree(root / "megatron", root / "bare", ignore=shutil.ignore_patterns("hf", "checksums.json"))
    shutil.copytree(root / "bare", root / "foreign/iter_0000012")
    (root / "foreign/latest_checkpointed_iteration.txt").write_text("12\n")
    _run_directory(root, tree)
    (root / "dump").mkdir()
    _dump(root)
    study = {"name": "small", "base": "run.yaml", "seeds": [0], "axes": {"objective": {"a": {"objective": "pg"}}}}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    (root / "studied/a/seed-0").mkdir(parents=True)
    (root / "studied/study.json").write_text(json.dumps(study))
    before = Path.cwd()
    os.chdir(root)
    code, _, error = answer(_split(f"eval model --prompts heldout.jsonl {_EVAL} --out kept.jsonl"))
    assert code == 0, error
    yield root
    os.chdir(before)


def _dump(root: Path) -> None:
    """What `rollout` would write for 4 steps."""
    config = load_config(root / "run.yaml", ["model.hf_path=" + json.dumps(str(root / "model"))])
    size = config.rollout.samples_per_prompt
    completions = tuple(Completion((3, 4), (-0.5, -0.25), "length", "t3 t4", 0) for _ in range(size))
    for step in range(1, config.run.num_steps + 1):
        prompts = [Prompt(f"p{number}", (5, 6), "7", "t5 t6") for number in range(config.rollout.prompts_per_step)]
        groups = [RolloutGroup(prompt, completions, (0.0,) * (size - 1) + (1.0,)) for prompt in prompts]
        write_rollout(rollout_file(root / "dump", step), step, groups, identity(config))


def _split(arguments: str) -> list[str]:
    return [part.replace("_", " ") if part.startswith("t1_") else part for part in arguments.split()]


def _run_directory(root: Path, tree: dict[str, object]) -> None:
    old = root / "old"
    step = old / "checkpoints/step_000002"
    step.mkdir(parents=True)
    shutil.copytree(root / "megatron", step / "trainer")
    shutil.copytree(root / "model", old / "hf")
    record = {"counters": {"num_steps": 2}, "layout": {"world_size": 1}, "versions": {"torch": "2"}}
    (step / "trainer/trainer.json").write_text(json.dumps(record))
    assert isinstance(tree["run"], dict)
    (old / "config.yaml").write_text(yaml.safe_dump(tree | {"run": tree["run"] | {"run_dir": "old"}}))
    progress = {"step": 2, "policy_version": 3, "accuracy": {}, "phase_s": {}, "num_trained_tokens": 9, "wall_s": 1.0}
    (step / "driver.json").write_text(json.dumps({"progress": progress, "fingerprint": "x", "versions": {}}))
    rows = [{"step": step, "time/step_s": 1.0, "time/train_s": 0.5, "reward/mean": 0.25} for step in range(3)]
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`rollout` ends where it would start some."""
    monkeypatch.setattr(roll_out, "roll_out", lambda *args: None)


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_broken_directory_is_answered_by_name_and_nothing_is_left(directory: Path, case: Case) -> None:
    draw = Random(f"{SEED}/{case.arguments}/{case.place}")
    place, found = directory / case.place, list[str]()
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    for number in range(-1, NUM_EXAMPLES):
        path = draw.choice(files)
        with broken(draw, path) if number >= 0 else whole() as how:
            before = state(directory.parent)
            code, output, error = answer(_split(case.arguments))
            after = state(directory.parent)
            left = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
            for name in set(left) - before.keys():
                if os.path.lexists(directory.parent / name):
                    remove(directory.parent / name)
            wrong = fault(case, path, code, output, error, left)
            if number < 0 and code != case.expected:
                wrong = "what is whole is called broken"
        if wrong:
            shown = f"  {path.relative_to(directory)}: {how}\n  answer {code}: {error[:1500]}"
            found.append(f"{wrong}\n  example {number} of seed {SEED}: {case.arguments}\n{shown}")
    assert not found, f"{len(found)} of {NUM_EXAMPLES}:\n" + "\n".join(found)


class whole:
    def __enter__(self) -> str:
        return "nothing"

    def __exit__(self, *error: object) -> None: ...


def fault(case: Case, path: Path, code: int, output: str, error: str, left: list[str]) -> str | None:
    """What is wrong with an answer."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in error + output:
        return "a traceback"
    made = {f"inputs/{name}" for name in NEW}
    strange = [name for name in left if code or not any(name == new or name.startswith(f"{new}/") for new in made)]
    if strange := [name for name in strange if name != "inputs/kept.jsonl"]:
        return f"left behind or changed: {strange}"
    if code != 2:
        return None
    if error.count("\n") > MAX_LINES or len(error) > MAX_CHARACTERS:
        return "a long answer"
    names = {part for part in path.relative_to(Path.cwd()).parts}
    return None if any(name in error for name in names) else "the place isn't named"


def test_what_convert_accepts_comes_back(directory: Path) -> None:
    """Every file of the directory, with its bytes; or its name is told."""
    draw, found, num_accepted = Random(f"{SEED}/back"), list[str](), 0
    files = sorted(path for path in (directory / "sharded").rglob("*") if path.is_file())
    for number in range(4 * NUM_EXAMPLES):
        with broken(draw, draw.choice(files)) as how:
            code, told, error = answer(["convert", "hf-to-megatron", "--hf", "sharded", "--out", "there"])
            if code == 0:
                code, also, error = answer(["convert", "megatron-to-hf", "--megatron", "there", "--out", "back"])
                lost = (
                    []
                    if code
                    else [
                        name
                        for name in not_equal(Path("sharded"), Path("back"))
                        if ascii(name)[1:-1] not in told + also
                    ]
                )
                num_accepted += 1
                if code or lost:
                    found.append(f"example {number}: {how}: {code} {error[:500]} {lost}")
        for name in ("there", "back"):
            shutil.rmtree(name, ignore_errors=True)
    assert not found, "\n".join(found)
    assert num_accepted >= NUM_EXAMPLES // 2


def not_equal(one: Path, other: Path) -> list[str]:
    names = [str(path.relative_to(one)) for path in one.rglob("*") if not path.is_dir()]
    return [name for name in names if not (other / name).is_file() or not filecmp.cmp(one / name, other / name, False)]
