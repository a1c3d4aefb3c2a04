"""`drpo-megatron study` from end to end: real runs, one that fails, a kill in between, and the report."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from drpo_megatron.study.cells import read_record
from tests.orchestration import command
from tests.slurm.cluster import Slurm, missing, wait_until
from tests.study.small import STUDY, write_base

FILE: dict[str, Any] = STUDY | {
    "overrides": {"run.num_steps": 8, "checkpoint.every": 1, "checkpoint.save_hf": False, "eval.every": 2},
    "axes": {
        "objective": {
            "grpo": {"objective": "grpo"},
            "drpo": {"objective": {"name": "drpo", "delta": 0.15}},
            "broken": {"objective": "pg", "cluster.startup_timeout_s": 0.001},
        }
    },
}


TIMEOUT_S = 1200.0


def run_study(directory: Path, *arguments: str) -> tuple[int, str]:
    return command.finish(command.start(directory, "study", *arguments), directory, TIMEOUT_S)


def wait_for(process: Any, directory: Path, run: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not any(row["step"] >= step for row in command.metrics(run)):
        assert process.poll() is None, (directory / "output.txt").read_text()
        assert time.monotonic() < deadline, f"{run} has no step {step}"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_study_is_killed_goes_on_repeats_nothing_and_reports(tmp_path: Path) -> None:
    write_base(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    runs = tmp_path / "runs" / "small"
    grpo, drpo, broken, start = (runs / name / "seed-0" for name in ("grpo", "drpo", "broken", "_prepare"))

    process = command.start(tmp_path, "study", "study.yaml", "--workers", "2")
    wait_for(process, tmp_path, grpo, 1)
    children = command.descendants(process)
    process.send_signal(signal.SIGINT)
    code, output = command.finish(process, tmp_path, TIMEOUT_S)
    assert code == 130 and "interrupted; the same command goes on from here" in output
    assert command.still_running(children, within_s=60) == []
    record = read_record(grpo)
    assert record is not None and record.state == "interrupted"
    start_made = (start / "summary.json").stat().st_mtime_ns

    code, output = run_study(tmp_path, "study.yaml", "--dry-run")
    assert code == 0 and f"{Path('runs/small/_prepare/seed-0')}  done" in output
    assert f"{Path('runs/small/grpo/seed-0')}  to be continued" in output

    code, output = run_study(tmp_path, "study.yaml", "--workers", "2")
    assert code == 1 and "1 of 4 runs failed; the same command tries again" in output
    assert "continuing grpo of seed 0" in output and "starting the start" not in output
    assert "broken of seed 0: failed after" in output
    assert (start / "summary.json").stat().st_mtime_ns == start_made
    records = [read_record(path) for path in (grpo, drpo, broken)]
    assert [record and record.state for record in records] == ["done", "done", "failed"]
    assert records[0] is not None and records[0].attempts == 2
    # Both began with the policy that the shared start made, which was measured there.
    before = json.loads((start / "summary.json").read_text())["heldout_before"]
    assert [json.loads((run / "summary.json").read_text())["heldout_before"] for run in (grpo, drpo)] == [before] * 2

    made = {path: path.stat().st_mtime_ns for run in (grpo, drpo) for path in run.rglob("*")}
    code, output = run_study(tmp_path, "study.yaml", "--only", "objective=grpo,drpo")
    assert code == 0 and "3 runs, 3 of them done before" in output
    assert {path: path.stat().st_mtime_ns for run in (grpo, drpo) for path in run.rglob("*")} == made

    code, output = run_study(tmp_path, "report", "runs/small")
    assert code == 0, output
    assert "1 of 3 runs are incomplete and are left out: broken seed 0 (failed)." in output
    html, markdown = (runs / "report.html").read_text(), (runs / "report.md").read_text()
    assert html.count("data:image/png;base64,") >= 9
    assert "| broken | - |" in markdown
    for row in (grpo, drpo):
        accuracy = json.loads((row / "summary.json").read_text())["heldout_after"]
        assert f"| {row.parent.name} | {accuracy:.3f}" in markdown  # Shares: no accuracies.


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")
def test_every_run_is_a_slurm_job_after_that_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path)
    cells = {name: FILE["axes"]["objective"][name] for name in ("grpo", "drpo")}
    file = FILE | {"axes": {"objective": cells}, "overrides": {"run.num_steps": 1, "checkpoint.save_hf": False}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
    runs = tmp_path / "runs" / "small"
    with Slurm(1) as slurm:
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, slurm.environment[name])
        code, output = run_study(tmp_path, "study.yaml", "--slurm=--cpus-per-task=2")
        assert code == 0, output
        submitted = re.search(r"submitted: (\d+), (\d+)", output)
        assert submitted is not None, output
        wait_until(lambda: not slurm.output("squeue", "--noheader").strip(), "the end of all jobs", TIMEOUT_S)
    outputs = {path.name: path.read_text(errors="replace") for path in (runs / "slurm").glob("*.out")}
    starts, cell_jobs = submitted.groups()
    assert set(outputs) == {f"{starts}_0.out", f"{cell_jobs}_0.out", f"{cell_jobs}_1.out"}, outputs
    for cell in cells:
        assert (runs / cell / "seed-0" / "summary.json").is_file(), outputs
    code, output = run_study(tmp_path, "study.yaml", "--slurm=")
    assert code == 0 and "submitted: nothing, all runs are done" in output
