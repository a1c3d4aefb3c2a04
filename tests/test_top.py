"""`drpo-megatron top` on the files of a run, while they are written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.cli import main
from drpo_megatron.commands.top import sparkline
from drpo_megatron.config import save_config
from drpo_megatron.sinks import JsonLines
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "reward/mean": step / 10,
        "mismatch/abs_prob_shift/mean": 1e-7 * step,
        "rollout/staleness/max": 1,
        "objective/weight/min": float("nan"),
        "time/step_s": 2.0,
        "time/train_s": 1.5,
        "time/generate_s": 0.5,
        "memory/trainer_mb/max": 2048.0,
        "memory/trainer_mb/fullest_rank": 1,
        "memory/trainer_mb/rank0": 1024.0,
        "memory/trainer_mb/rank1": 2048.0,
    } | changes


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Path, JsonLines]]:
    """A run's directory without a step, and what writes its metrics."""
    directory = tmp_path / "my-run"
    directory.mkdir()
    save_config(tiny_config("model", run={"num_steps": 40}), directory / "config.yaml")
    sink = JsonLines(directory / "metrics.jsonl", None)
    yield directory, sink
    sink.close()


def shown(capsys: pytest.CaptureFixture[str], directory: Path) -> str:
    assert main(["top", str(directory), "--once"]) == 0
    return capsys.readouterr().out


def test_one_frame_shows_the_state_of_a_run(run: tuple[Path, JsonLines], capsys: pytest.CaptureFixture[str]) -> None:
    directory, sink = run
    assert "no step is done yet" in shown(capsys, directory)
    for step in range(21):
        sink.log(step, {"eval/accuracy": 0.25} if step == 0 else row(step))
    text = shown(capsys, directory)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "my-run  step 20/40, 2.0 s a step, 40 s left" in text
    # Now, the mean of steps 11 to 20, the lowest, the highest, and a line that rises.
    assert lines["reward"].split()[1:5] == ["2.000", "1.550", "0.100", "2.000"]
    assert lines["reward"].rstrip().endswith(sparkline(range(1, 21)))
    assert max(map(len, text.splitlines())) <= 80
    assert "2.0e-06" in lines["|pi-mu| to the engine"]
    assert "smallest weight w" not in text  # Never a number.
    assert lines["train"].split()[1] == "1.5" and lines["generate"].split()[1] == "0.5"
    assert "memory of trainer ranks: at most 2.0 GiB, on rank 1" in text
    assert text.index("rank 1 ") < text.index("rank 0 ")


def test_a_line_that_is_being_written_is_not_there_yet(
    run: tuple[Path, JsonLines], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, sink = run
    sink.log(1, row(1))
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')
    assert "step 1/40" in shown(capsys, directory)


def test_it_follows_a_run_to_its_end(run: tuple[Path, JsonLines]) -> None:
    directory, sink = run
    process = subprocess.Popen(
        [sys.executable, "-m", "drpo_megatron.cli", "top", str(directory), "--interval", "0.1"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    for step in range(1, 41):
        sink.log(step, row(step))
        time.sleep(0.01)
    (directory / "summary.json").write_text("{}")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "step 40/40, 2.0 s a step, ended" in out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(tmp_path)]) == 2
    assert "is no run directory: config.yaml is missing" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"time/train_s": None}, {"memory/trainer_mb/rank0": None}, {"time/step_s": 1e308}])
def test_numbers_that_are_missing_or_enormous_are_shown_as_such(
    run: tuple[Path, JsonLines], capsys: pytest.CaptureFixture[str], changed: dict[str, Any]
) -> None:
    directory, _ = run
    rows = [{"step": step} | row(step, **{"objective/weight/min": None}) | changed for step in (1, 2, 3)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(fields) + "\n" for fields in rows))
    assert "step 3/40" in shown(capsys, directory)


@pytest.mark.parametrize("value", ["null", "1e999", "1" + "0" * 400, '"x"', "true"])
def test_a_damaged_line_is_named(run: tuple[Path, JsonLines], capsys: pytest.CaptureFixture[str], value: str) -> None:
    directory, _ = run
    (directory / "metrics.jsonl").write_text(f'{{"step": 1, "time/step_s": {value}}}\n')
    assert main(["top", str(directory), "--once"]) == 2
    error = capsys.readouterr().err
    assert f"{directory / 'metrics.jsonl'}" in error and "time/step_s" in error and error.count("\n") == 1


def test_a_sparkline_spans_its_values() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([-1e308, 1e308]) == "▁▁"  # Their difference is no number.
