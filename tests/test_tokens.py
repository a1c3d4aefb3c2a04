"""Tokens of other services stand in nothing that a run writes or prints (docs/security.md, Keys)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.orchestration import command

MARKS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_markerThatNobodyMayWriteAnywhere",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherMarkerThatNobodyMayWrite",
    "AWS_SECRET_ACCESS_KEY": "secretMarkerOfAnotherService",
}


def test_tokens_of_the_environment_stand_in_nothing_that_a_run_writes(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    command.prepare(work, run={"run_dir": "run", "num_steps": 2})
    code, output = command.finish(command.start(work, "train", "run.yaml", "rollout.dump=true", **MARKS), work)
    assert code == 0, output
    environment = os.environ | MARKS | {"PYTHONPATH": str(command.ROOT), "OMP_NUM_THREADS": "1"}
    submit = ["slurm", "submit", "run.yaml", "--nodes", "1", "--gpus-per-node", "0", "--dry-run", "run.run_dir=job"]
    told = [output]
    for arguments in (
        submit,
        ["train", "--resume", "run", "--dry-run"],
        ["train", "nothing.yaml"],
        ["doctor", "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "drpo_megatron.cli", *arguments],
            cwd=work, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        told.append(done.stdout + done.stderr)
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "summary.json"} <= {path.name for path in files}
    marks = [mark.encode() for mark in MARKS.values()]
    assert [path for path in files if any(mark in path.read_bytes() for mark in marks)] == []
    assert not any(mark in text for mark in MARKS.values() for text in told)
    assert "#SBATCH" in told[1]
