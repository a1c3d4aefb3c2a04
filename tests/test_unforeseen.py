"""What no command foresaw ends in a line or two and a file, never in a traceback on the terminal."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from drpo_megatron import cli
from drpo_megatron.commands import BadInput, doctor

ROOT = Path(__file__).parents[1]


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """`drpo-megatron doctor --compare x` with an error that its code doesn't expect."""

    def run(source: str) -> None:
        raise error

    monkeypatch.setattr(doctor, "_compare", run)
    return cli.main(["doctor", "--compare", "x"])


def test_a_defect_writes_its_traceback_to_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fail_with(KeyError("weight_map"), monkeypatch) == 70
    [file] = tmp_path.iterdir()
    error = capsys.readouterr().err
    assert error.splitlines()[0] == "error: this should not have happened: KeyError: 'weight_map'"
    assert str(file) in error and len(error.splitlines()) == 2 and "Traceback" not in error
    assert "Traceback" in file.read_text() and "raise error" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_where_the_current_directory_cannot_be_written_to_the_temporary_one_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("pathlib.Path.cwd", lambda: Path("/proc"))
    assert fail_with(TypeError("x"), monkeypatch) == 70
    assert [str(file) in capsys.readouterr().err for file in tmp_path.iterdir()] == [True]


KNOWN = [
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 1, "error: runs/a: No space left on device"),
    (MemoryError("4 GiB"), 1, "error: this machine has not enough memory: 4 GiB"),
    (RecursionError(), 2, "error: something in the input is nested too deeply"),
    (json.JSONDecodeError("Expecting value", "x", 0), 2, "error: a file is not JSON: Expecting value"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "error: a text or a file is not UTF-8"),
    (yaml.scanner.ScannerError("while scanning", None, "found", None), 2, "error: a file is not YAML: while scanning"),
    (BadInput(ValueError("--x=1 does not fit --y=2; use 3")), 2, "error: --x=1 does not fit --y=2; use 3"),
]


@pytest.mark.parametrize(("error", "code", "said"), KNOWN, ids=[type(error).__name__ for error, _, _ in KNOWN])
def test_kinds_that_speak_for_themselves_get_a_line_and_no_file(
    error: Exception,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fail_with(error, monkeypatch) == code
    found = capsys.readouterr().err
    assert found.startswith(said) and len(found.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]
)
def test_an_output_that_takes_no_unicode_gets_escapes(tmp_path: Path, environment: dict[str, str]) -> None:
    """A real run's directory, a metric's curve in block characters, and a name that is not ASCII."""
    run = tmp_path / "größe"
    run.mkdir()
    (run / "config.yaml").write_bytes((ROOT / "examples" / "quickstart.yaml").read_bytes())
    rows = [{"step": step, "time/step_s": 1.0, "reward/mean": step / 3} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "drpo_megatron.cli", "top", str(run), "--once"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0 and done.stderr == b""
    assert b"step 3/" in done.stdout and b"\\u2588" in done.stdout
