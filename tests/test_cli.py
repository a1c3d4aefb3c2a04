"""The command line without a run: help, plans and bad input, none of which starts a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron import __version__
from drpo_megatron.cli import main
from tests.orchestration import command


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return command.prepare(tmp_path).relative_to(tmp_path)


def outcome(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["train", "nowhere.yaml"]])
def test_help_and_bad_input_import_neither_torch_nor_ray(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom drpo_megatron.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "print('imported:', sorted({'torch', 'ray', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=command.ROOT, capture_output=True, text=True, check=True)
    assert "imported: []" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, f"drpo-megatron {__version__}\n", "")


def test_help_config_explains_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "train", "--help-config")
    assert code == 0
    assert "trainer.optimizer.lr: " in out and "Peak learning rate." in out


def test_a_dry_run_prints_config_and_plan_and_writes_nothing(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run_file.parent.iterdir())
    code, out, _ = outcome(capsys, "train", run_file, "--dry-run", "run.num_steps=10", "objective=grpo")
    assert code == 0
    printed = yaml.safe_load(out)
    assert printed["run"]["num_steps"] == 10 and printed["objective"]["name"] == "grpo"
    # 4 prompts x 4 samples = 16 sequences a step, 2 optimiser steps of 8; in 10 steps 20 of them on 160 sequences.
    assert "4 prompts x 4 samples = 16 sequences, trained in 2 optimiser step(s) of 8" in out
    assert "10 steps, 20 optimiser steps, 160 sequences" in out
    assert "16 to train on, 8 held out" in out
    assert sorted(run_file.parent.iterdir()) == before


def test_a_dry_run_refuses_a_directory_that_holds_a_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_file.parent / "run" / "checkpoints").mkdir(parents=True)
    code, out, err = outcome(capsys, "train", run_file, "--dry-run")
    assert (code, out) == (2, "")
    assert err.startswith("error: run holds another run;")


def test_eval_names_everything_that_is_wrong_before_it_loads_the_model(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--prompts", "nowhere.jsonl", "--reward", "arithmetic", "--max-response-tokens", 256)
    code, out, err = outcome(capsys, "eval", "model", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: this model can't be scored: 2 problems")
    assert "data.heldout: nowhere.jsonl" in err and "rollout.max_response_tokens=256" in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.optimizer.lrr=1e-3"], r"did you mean trainer\.optimizer\.lr\?"),
        (["objective.delta=-1"], r"objective\.delta"),
        (["data.train=missing.jsonl"], r"missing\.jsonl"),
        (["model.hf_path=nowhere"], "nowhere"),
        (["rollout.prompts_per_step=17"], "has 16 prompts, but 17 different ones may be drawn at a time"),
        (["rollout.max_staleness=4"], "has 16 prompts, but 20 .* for rollout.max_staleness=4 steps ahead"),
        (["not-an-override"], r"KEY=VALUE"),
    ],
)
def test_bad_input_is_told_before_anything_starts(
    run_file: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    code, _, err = outcome(capsys, "train", run_file, *overrides)
    assert code == 2
    assert err.splitlines()[0].startswith("error: ")
    assert re.search(message, err), err
    assert not Path("run").exists()


def test_a_train_without_a_file_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "train")
    assert code == 2 and "give a YAML file" in err


def test_a_directory_that_holds_another_run_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("of another run")
    code, _, err = outcome(capsys, "train", run_file)
    assert code == 2 and "run holds another run" in err
    assert Path("run/config.yaml").read_text() == "of another run"


def test_a_resume_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "train", "--resume", tmp_path)
    assert code == 2 and "holds no run to resume" in err


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "train", "run.yaml", "--dry")
    assert code == 2 and "--dry" in err


def test_eval_of_a_directory_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "eval", tmp_path)
    assert code == 2 and "neither a run" in err


def test_eval_of_a_bare_checkpoint_names_the_options_it_needs(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = outcome(capsys, "eval", "model", "--prompts", "heldout.jsonl")
    assert code == 2 and "give --reward, --max-response-tokens" in err
