"""`drpo-megatron convert` as processes: what they print, how they exit, and what is left when they are killed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_megatron.cli import main
from drpo_megatron.conversion.logits import compare_logits
from drpo_megatron.conversion.verify import verify
from tests.checkpoint.test_convert import edit, same_files, shard
from tests.tiny import save_checkpoint, tiny_moe_config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

KILLED = """
import json, os, re, signal, sys
from drpo_megatron.cli import main
from drpo_megatron.conversion import to_hf, to_megatron
from drpo_megatron.trainer import platform

platform.activate("cpu")
import megatron.core.dist_checkpointing, megatron.core.models.gpt.gpt_layer_specs
from transformers import Qwen3MoeConfig
# Now the children needn't import it all.

def die_at(event, path, countdown):
    def hook(found, arguments):
        nonlocal countdown
        if found == event and re.search(path, str(arguments[0])):
            countdown -= 1
            if not countdown:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for event, path, countdown, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        die_at(event, path, countdown)
        os._exit(main(["convert", *arguments]))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
"""Conversions that are killed by their n-th call of a kind: no moment depends on the machine's speed."""

SCRATCH = r"\.writing-[0-9a-f]+"
Moment = tuple[str, str, int]
TO_MEGATRON: dict[str, Moment] = {
    "first file": ("open", SCRATCH, 1),
    "weights": ("open", SCRATCH + r"/__0_0\.distcp", 1),
    "name": ("os.rename", SCRATCH + "$", 1),
}
TO_HF: dict[str, Moment] = {
    "first file": ("open", SCRATCH, 1),
    "weights": ("open", SCRATCH + "/part-1", 9),
    "name": ("os.rename", SCRATCH + "$", 1),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = save_checkpoint(tmp_path_factory.mktemp("command") / "hf", tiny_moe_config(num_hidden_layers=2))
    shard(source, 3)
    return source


def kill(*conversions: tuple[Moment, list[str]]) -> None:
    """Each conversion in a process of its own, which kills itself at its moment."""
    program = [sys.executable, "-c", KILLED, json.dumps([(*moment, arguments) for moment, arguments in conversions])]
    found = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert found.stdout.split() == [str(-signal.SIGKILL)] * len(conversions), found.stderr


def test_killed_conversions_leave_nothing_that_looks_finished_and_start_again(source: Path, tmp_path: Path) -> None:
    megatron, replaced = tmp_path / "megatron", tmp_path / "replaced"
    main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(megatron)])
    replaced.mkdir()
    (replaced / "old").touch()
    commands = {
        f"to-megatron, {name}": (moment, ["hf-to-megatron", "--hf", str(source)])
        for name, moment in TO_MEGATRON.items()
    } | {f"to-hf, {name}": (moment, ["megatron-to-hf", "--megatron", str(megatron)]) for name, moment in TO_HF.items()}
    commands = {name: (moment, [*words, "--out", str(tmp_path / name)]) for name, (moment, words) in commands.items()}
    replacement = ["hf-to-megatron", "--hf", str(source), "--out", str(replaced), "--force"]
    kill(*commands.values(), (TO_MEGATRON["weights"], replacement))

    assert [path.name for path in replaced.iterdir()] == ["old"]
    for name, (_, arguments) in commands.items():
        assert not (tmp_path / name).exists()
        assert len(list(tmp_path.glob(f".{name}.writing-*"))) == 1  # It was in the middle of it.
        assert main(["convert", *arguments]) == 0
    assert main(["convert", *replacement]) == 0
    assert list(tmp_path.glob(".*")) == []  # What the killed ones left was cleared away.
    for name in TO_MEGATRON:
        assert verify(source, tmp_path / f"to-megatron, {name}").differences == []
    assert all(same_files(source, tmp_path / f"to-hf, {name}") for name in TO_HF)


def test_the_tool_shows_rate_and_time_left_in_a_terminal(source: Path, tmp_path: Path) -> None:
    main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "megatron")])
    tool = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
    arguments = ["megatron-to-hf", "--megatron", str(tmp_path / "megatron"), "--out", str(tmp_path / "out")]
    controller, terminal = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([*tool, *arguments], env=environment, stdout=subprocess.PIPE, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # So Linux says that the process has closed its side.
            while piece := os.read(controller, 4096):
                shown += piece
        os.close(controller)
        assert process.wait(300) == 0, shown
        assert process.stdout is not None
        assert process.stdout.read().decode() == f"{tmp_path / 'out'}: 3 files, 137,856 bytes of tensors\n"
    for expected in (b"to Hugging Face", b"137.9/137.9 kB", b"B/s", b"0:00:00"):
        assert expected in shown


def test_verify_compares_weights_and_logits(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    megatron, changed = tmp_path / "megatron", tmp_path / "changed"
    main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(megatron)])
    capsys.readouterr()
    prompt = ["--logits", "--prompt", "t1 t2 t3 t4 t5 t6"]
    assert main(["convert", "verify", "--hf", str(source), "--megatron", str(megatron), *prompt]) == 0
    equal, config, logits = capsys.readouterr().out.splitlines()
    assert (equal, config) == ("45 of 45 tensors are equal", "config.json says the same")
    assert logits.startswith("logits of 6 tokens differ by ") and logits.endswith(
        "of the largest (limit 0.0001 in fp32)"
    )

    save_checkpoint(changed, tiny_moe_config(num_hidden_layers=2))
    edit(changed, lambda tensors: tensors["model.layers.0.mlp.experts.1.up_proj.weight"][0, :2].add_(1.0))
    assert main(["convert", "verify", "--hf", str(changed), "--megatron", str(megatron)]) == 1
    error = capsys.readouterr().err
    assert (
        "1 tensors differ:\n  model.layers.0.mlp.experts.1.up_proj.weight: 2 of 768 values differ, by up to 1" in error
    )


def test_logits_of_another_model_differ(source: Path, tmp_path: Path) -> None:
    main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "megatron")])
    other = save_checkpoint(tmp_path / "other", tiny_moe_config(num_hidden_layers=2), seed=1)
    assert not compare_logits(other, tmp_path / "megatron", "t1 t2 t3").is_same


def test_inspect_says_what_a_directory_holds(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "megatron"), "--dtype", "bf16"])
    capsys.readouterr()
    for directory, expected in (
        (source, {"kind": "Hugging Face checkpoint", "dtypes": "float32 34,464", "files": "3, complete"}),
        (tmp_path / "megatron", {"kind": "Megatron checkpoint (torch_dist)", "saved by": "conversion"}),
        (tmp_path / "megatron" / "hf", {"family": "qwen3_moe", "layers": "2", "experts": "4, 2 a token"}),
    ):
        assert main(["convert", "inspect", str(directory)]) == 0
        lines = capsys.readouterr().out.splitlines()
        facts = {name: fact for name, _, fact in (line.partition("  ") for line in lines)}
        facts = {name: fact.strip() for name, fact in facts.items()}
        assert facts | expected == facts
    assert main(["convert", "inspect", str(tmp_path)]) == 2
    assert "is neither a Hugging Face checkpoint" in capsys.readouterr().err


def test_bad_input_exits_with_2_and_one_message(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path)]) == 2
    assert "already exists; choose another directory, or --force to replace it" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "megatron-to-hf", "--megatron", "a", "--out", "b", "--max-shard-size", "5 apples"])
    assert "'5 apples' is not a size such as 5GB or 500MB" in capsys.readouterr().err
