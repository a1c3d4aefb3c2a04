"""Command lines drawn from the parser itself: every command and option that it has, with values that nobody should give.

Asserted as for broken files: an exit code that the docs name, a few lines, no traceback, nothing left. What would start
processes is told not to (`--dry-run`, `--once`, `--compare`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from drpo_megatron import cli
from drpo_megatron.conversion.to_megatron import hf_to_megatron
from drpo_megatron.orchestration import roll_out
from tests.broken import SEED, answer, remove, state
from tests.orchestration import command

NUM_EXAMPLES = int(os.environ.get("BROKEN_EXAMPLES", "12"))
MAX_LINES, MAX_CHARACTERS = 60, 8000  # With the usage.
VALUES = (
    "", " ", "-", "--", "-1", "0", "1", "2", "1.5", "nan", "inf", "-inf", "1e999", "9" * 30, "x", "x" * 5000, "0x10", "1_000",
    "\uff12", "\udcff", "\u202e", "a\nb", "a\n#SBATCH --wrap=x", "$(id)", "`id`", "'", '"', "..", "../..", "/", "/dev/null",
    "/etc/passwd", "/nowhere/at/all", "nothing", "~", "=", "a=", "=b", "a=b", "run.num_steps=1", "run.num_steps=-1",
    "run={", "run.name=../x", "objective=drpo", "objective=[1]", "trainer.optimizer.lr=nan", "a" + ".b" * 300 + "=1",
    "run.yaml", "model", "heldout.jsonl", "model/config.json", "5GB", "0GB", "1e9GB", "10 parsecs", "01:00:00", "-1:00",
    "arithmetic", "math", "os:system", "my_rewards:nothing", "my_rewards:share_of_even_tokens", "no.such:thing", "bf16",
)  # fmt: skip
PLAUSIBLE = {
    "--hf": "model", "--megatron": "megatron", "--out": "new", "--nodes": "1", "--gpus-per-node": "0", "--steps": "1",
    "--prompts": "heldout.jsonl", "--reward": "my_rewards:share_of_even_tokens", "--samples": "1", "--temperature": "1",
    "--max-response-tokens": "2", "--seed": "0", "arguments": "run.yaml", "model": "model", "directory": "megatron",
}  # fmt: skip
HARMLESS = {"train": "--dry-run", "study": "--dry-run", "top": "--once", "doctor": "--compare=run.yaml"}
LEFT_OUT = {"--check", "--plot", "--accept", "--search", "--logits"}
"""Seconds each."""
KEEPS_ITS_DATA = {"quickstart"}
"""Whatever its overrides are, which `train` takes, too (tests/setup/test_wheel.py)."""
COMMANDS = ["train", "convert", "doctor", "eval", "plan", "rollout", "slurm", "study", "top"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("outer") / "inputs"
    root.mkdir()
    command.prepare(root)
    hf_to_megatron(root / "model", root / "megatron", say=lambda text: None)
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)


@pytest.mark.parametrize("name", COMMANDS)
def test_broken_arguments_are_answered_and_nothing_is_left(
    directory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_out, "roll_out", lambda *args: None)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    draw, before, found = Random(f"{SEED}/{name}"), state(directory.parent), list[str]()
    for number in range(3 * NUM_EXAMPLES):
        arguments = drawn(draw, name)
        code, output, error = answer(arguments)
        after = state(directory.parent)
        left = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        if wrong := fault(code, output, error, left):
            shown = [argument[:80] for argument in arguments]
            found.append(f"{wrong}\n  example {number} of seed {SEED}: {shown}\n  answer {code}: {error[-1500:]}")
        for path in set(left) - before.keys():
            if os.path.lexists(directory.parent / path):
                remove(directory.parent / path)
    assert not found, "\n".join(found)


def test_all_commands_are_drawn() -> None:
    assert set(COMMANDS) | KEEPS_ITS_DATA == subcommands(cli._parser()).keys()


def drawn(draw: Random, name: str) -> list[str]:
    parser, arguments = subcommands(cli._parser())[name], [name]
    if inner := subcommands(parser):
        action = draw.choice(sorted(inner))
        parser, arguments = inner[action], [name, action]
    for option in parser._actions:
        flags = [flag for flag in option.option_strings if flag not in {*LEFT_OUT, "-h", "--help"}]
        if option.option_strings and (not flags or (not option.required and draw.random() < 0.6)):
            continue
        value = draw.choice(sorted(option.choices) if option.choices and draw.random() < 0.5 else VALUES)
        if draw.random() < 0.7:
            value = PLAUSIBLE.get(flags[0] if flags else option.dest, value)
        if not option.option_strings:
            arguments += ["run.yaml"] * (draw.random() < 0.5) + [value] * draw.choice([0, 1, 1, 2])
        elif option.nargs == 0:
            arguments.append(flags[0])
        else:
            arguments += [f"{flags[0]}={value}"] if draw.random() < 0.7 else [flags[0], value]
    if draw.random() < 0.05:
        arguments.append(draw.choice(["--no-such-option", "-x", "--resum=x"]))
    return [
        *arguments,
        *[flag for key, flag in HARMLESS.items() if key == name],
        *["--dry-run"] * (arguments[1:2] == ["submit"]),
    ]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def fault(code: int, output: str, error: str, left: list[str]) -> str | None:
    """What is wrong with an answer."""
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in error + output:
        return "a traceback"
    if left and code:
        return f"left behind or changed: {left}"
    if code == 0:
        return None
    is_long = error.count("\n") > MAX_LINES or len(error) > MAX_CHARACTERS
    return "a long answer" if is_long else None if "error: " in error else "no reason is given"
