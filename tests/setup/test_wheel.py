"""A wheel is complete: from it alone, in an empty folder, the quickstart is made and trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHORT = ("warmup.num_steps=2", "run.num_steps=1", "rollout.prompts_per_step=4", "eval.samples_per_prompt=1")


def test_the_quickstart_runs_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    source, folder, installed = tmp_path / "source", tmp_path / "an empty folder", tmp_path / "installed"
    source.mkdir()
    for part in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "drpo_megatron", "examples"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, source / part)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), "."]
    subprocess.run([sys.executable, *build], cwd=source, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    folder.mkdir()
    done = drpo_megatron(folder, installed, "quickstart", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "quickstart.yaml").read_text() == (ROOT / "examples" / "quickstart.yaml").read_text()
    [run] = (folder / "runs").iterdir()
    assert json.loads((run / "summary.json").read_text())["num_steps"] == 1
    assert sorted(path.name for path in folder.iterdir()) == ["data", "quickstart.yaml", "runs"]

    (folder / "quickstart.yaml").write_text("run: {num_stepz: 1}\n")  # Kept, as it was edited.
    again = drpo_megatron(folder, installed, "quickstart")
    assert again.returncode == 2 and "num_stepz" in again.stderr and "Traceback" not in again.stderr
    refused = drpo_megatron(folder, installed, "quickstart", "my.yaml")
    assert refused.returncode == 2 and "my.yaml: give overrides as KEY=VALUE" in refused.stderr


def drpo_megatron(folder: Path, installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Not this checkout's: what was unpacked comes first."""
    program = "import drpo_megatron.cli as c, sys; assert c.__file__.startswith(sys.argv.pop(1)); sys.exit(c.main())"
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", program, str(installed), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
