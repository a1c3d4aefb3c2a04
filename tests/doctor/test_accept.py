"""`doctor --accept`: what runs, what is kept, what a hang, a crash and an interrupt leave. Stages are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from drpo_megatron.cli import main
from drpo_megatron.doctor.accept.display import Display
from drpo_megatron.doctor.accept.report import Report
from drpo_megatron.doctor.accept.runner import run_stages
from drpo_megatron.doctor.accept.stage import Outcome, Settings, Stage
from drpo_megatron.doctor.accept.stages import STAGES

MakeStage = Callable[..., Stage]
IDENTITY = {"host": "n1", "devices": ["H100", "H100"], "cpus": 2, "versions": {"torch": "2.13"}}


@pytest.fixture
def make_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStage:
    """A stage whose `run` has the given body. It counts its runs in `<name>.runs`."""
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), *sys.path]))

    def make(name: str, body: str, timeout_s: float = 120.0) -> Stage:
        source = f"""
            import os, signal, subprocess, sys, time
            from drpo_megatron.doctor.accept.stage import Skip
            def run(settings, results):
                open({str(tmp_path / (name + ".runs"))!r}, "a").write("x")
        """
        code = textwrap.dedent(source) + textwrap.indent(textwrap.dedent(body), "    ")
        (modules / f"stage_{name}.py").write_text(code)
        return Stage(name, f"what {name} proves", f"stage_{name}", timeout_s, grace_s=1.0)

    return make


def settings(tmp_path: Path) -> Settings:
    return Settings("cpu", 2, "tiny", str(tmp_path / "scratch"), "no-sglang", str(tmp_path / "runs"))


def accept(
    tmp_path: Path, stages: list[Stage], again: bool = False, identity: dict[str, Any] = IDENTITY
) -> tuple[Report, list[str]]:
    report = Report.open(tmp_path / "report", identity, settings(tmp_path))
    failed = run_stages(stages, report, stages, Display(len(stages)), again)
    return report, [stage.name for stage in failed]


def num_runs(tmp_path: Path, stage: Stage) -> int:
    file = tmp_path / f"{stage.name}.runs"
    return len(file.read_text()) if file.exists() else 0


def written(tmp_path: Path) -> dict[str, Outcome]:
    fields = json.loads((tmp_path / "report.json").read_text())
    return {name: Outcome.from_dict(outcome) for name, outcome in fields["stages"].items()}


def test_a_stage_is_what_its_checks_are(tmp_path: Path, make_stage: MakeStage) -> None:
    stages = [
        make_stage("good", "results.at_most('error', 0.5, 1.0)\nresults.figure('tokens_per_s', 12345.0)"),
        make_stage("bad", "results.passed('one', 'fine')\nresults.at_most('error', 2.0, 1.0)"),
        make_stage("nan", "results.at_most('error', float('nan'), 1.0)"),
        make_stage("skips", "raise Skip('needs two GPUs')"),
        make_stage("partly", "results.passed('one', 'fine')\nresults.skipped('liger', 'not installed')"),
        make_stage("nothing", "pass"),
        make_stage("raises", "results.passed('one', 'fine')\nraise ValueError('num_ranks=3 is odd')"),
    ]
    report, failed = accept(tmp_path, stages)
    assert failed == ["bad", "nan", "nothing", "raises"]
    outcomes = written(tmp_path)
    assert outcomes == report.outcomes
    assert [outcome.status for outcome in outcomes.values()] == [
        "pass",
        "fail",
        "fail",
        "skipped",
        "pass",
        "fail",
        "fail",
    ]
    assert outcomes["bad"].reason == "error: 2 (limit 1)"
    assert outcomes["skips"].reason == "needs two GPUs"
    assert outcomes["nothing"].reason == "it looked at nothing"
    assert "ValueError: num_ranks=3 is odd" in outcomes["raises"].reason
    assert [check.status for check in outcomes["partly"].checks] == ["pass", "skipped"]
    text = (tmp_path / "report.md").read_text()
    for expected in ("2 x H100", "| torch | 2.13 |", "12,345", "needs two GPUs", "not installed", "--stages good"):
        assert expected in text, expected


def test_what_hangs_or_crashes_is_a_failed_stage_and_takes_its_processes_with_it(
    tmp_path: Path, make_stage: MakeStage
) -> None:
    child = "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
    tell = f"open({str(tmp_path)!r} + '/pid', 'w').write(str(child.pid))\n"
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stages = [
        make_stage(
            "hang", f"{child}{tell}{deaf}results.passed('one', 'fine')\nprint('the last words')\ntime.sleep(1000)", 4
        ),
        make_stage("crash", "results.passed('one', 'fine')\nsys.stdout.flush()\nos.kill(os.getpid(), signal.SIGSEGV)"),
        make_stage("leaves", "os._exit(3)"),
        make_stage("next", "results.passed('one', 'fine')"),
    ]
    _, failed = accept(tmp_path, stages)
    assert failed == ["hang", "crash", "leaves"]
    outcomes = written(tmp_path)
    assert outcomes["hang"].reason.startswith("it hangs: not done after 4 s")
    assert "SIGSEGV" in outcomes["crash"].reason and outcomes["crash"].log in outcomes["crash"].reason
    assert "exit code 3" in outcomes["leaves"].reason
    assert [check.name for check in outcomes["crash"].checks] == ["one"], "what it had found before is lost"
    assert outcomes["next"].status == "pass"
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text())), "the hanging stage's child lives"


def test_what_is_finished_is_kept_until_the_machine_or_a_version_changes(tmp_path: Path, make_stage: MakeStage) -> None:
    good, bad = make_stage("good", "results.passed('one')"), make_stage("bad", "results.failed('one', 'no')")
    skips, late = make_stage("skips", "raise Skip('not yet')"), make_stage("late", "results.passed('one')")
    stages = [good, bad, skips, late]
    report, _ = accept(tmp_path, stages[:3])
    first = report.outcomes["good"]
    report, failed = accept(tmp_path, stages)
    assert [num_runs(tmp_path, stage) for stage in stages] == [1, 1, 2, 1]  # What was skipped was never run.
    assert failed == ["bad"] and report.outcomes["good"] == first and report.note == ""
    accept(tmp_path, [late, bad], again=True)
    assert [num_runs(tmp_path, stage) for stage in stages] == [1, 2, 2, 2]
    newer = IDENTITY | {"versions": {"torch": "2.14"}}
    report, _ = accept(tmp_path, [late], identity=newer)
    assert "torch was 2.13 and is 2.14" in report.note
    assert report.outcomes.keys() == {"late"} and num_runs(tmp_path, late) == 3


def test_a_file_that_is_no_report_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"format": 1}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match="report.json is not a report of this check"):
            Report.open(tmp_path / "report", IDENTITY, settings(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "los"], "los is none of environment, collectives"),
        (["--stages", ""], "nothing is none of"),
        (["--device", "gpu"], "sees no CUDA device"),
        (["--device", "cpu", "--num-devices", "0"], "'0' is no whole number within 1 ... 4096"),
        (["--patience", "0"], "'0' is no number within 0.01 ... 1000"),
    ],
)
def test_bad_options_are_answered_in_a_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    try:
        code = main(["doctor", "--accept", *arguments])
    except SystemExit as left:  # By argparse.
        code = left.code
    finally:
        signal.signal(signal.SIGTERM, before)
    assert code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_check_need_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--stages", "loss"]) == 2
    assert "--stages is an option of --accept, which was not given" in capsys.readouterr().err


def test_an_interrupted_check_leaves_nothing_running_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "drpo_megatron.cli", "doctor", "--accept", "--stages", "environment,collectives"]
    command += ["--device", "cpu", "--run-dir", str(tmp_path / "runs")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    check = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert check.stdout is not None
    for line in check.stdout:
        if "collectives" in line:
            break
    time.sleep(1.0)
    children = psutil.Process(check.pid).children(recursive=True)
    check.send_signal(signal.SIGINT)
    assert check.wait(120) == 130
    assert children and not any(child.is_running() and child.status() != "zombie" for child in children)
    first = json.loads((tmp_path / "gpu-report.json").read_text())["stages"]
    assert first.keys() == {"environment"}

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "gpu-report.json").read_text())["stages"]
    assert stages["environment"] == first["environment"], "a finished stage was run again"
    assert [stage["status"] for stage in stages.values()] == ["pass", "pass"]
    assert stages["collectives"]["checks"][0] == {
        "name": "sums",
        "status": "pass",
        "found": "gloo: exact over all ranks",
    }


def test_every_stage_can_be_run(tmp_path: Path) -> None:
    import importlib

    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert callable(importlib.import_module(stage.module).run), stage.name
