"""`drpo-megatron train` with SGLang: servers that somebody else runs, and servers of its own."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.orchestration import command
from tests.rollout.conftest import PYTHON, Served
from tests.tiny import SAME_WEIGHTS

_PATIENCE_S = 900.0


def abs_prob_shifts(run: Path) -> list[float]:
    return [row["mismatch/abs_prob_shift/max"] for row in command.metrics(run) if row["step"] > 0]


def test_a_run_trains_on_what_a_server_draws_with_its_weights(sglang: Served, tmp_path: Path) -> None:
    endpoint = sglang.keepers[0].server.endpoint
    (tmp_path / "key").write_text(f"{endpoint.api_key}\n")
    engine = {"name": "sglang", "servers": [endpoint.url], "api_key_file": "key"}
    command.prepare(
        tmp_path,
        run={"run_dir": "run", "num_steps": 2},
        trainer={"routing_replay": "rollout"},
        rollout={"engine": engine, "max_response_tokens": 6},
    )
    code, output = command.finish(command.start(tmp_path, "train", "run.yaml"), tmp_path, _PATIENCE_S)
    assert code == 0, output
    # Before the first optimiser step of a rollout pi is mu, and each step's weights are others.
    assert len(shifts := abs_prob_shifts(tmp_path / "run")) == 2 and max(shifts) < SAME_WEIGHTS
    assert max(row.get("shift/abs_prob_shift/max", 0.0) for row in command.metrics(tmp_path / "run")) > 1e-3
    # The server said which experts it used, and the trainer followed, although both would choose alike but for ties.
    for row in command.metrics(tmp_path / "run")[1:]:
        assert row["mismatch/router_flips/share"] == 0
        assert row["mismatch/router_overruled/share"] < 0.01
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["policy_version"] == 2


@pytest.mark.slow
def test_a_run_outlives_its_server_and_a_killed_run_leaves_none(tmp_path: Path) -> None:
    engine: dict[str, Any] = {"name": "sglang", "python": str(PYTHON), "sync": "tensor"}
    command.prepare(
        tmp_path,
        run={"run_dir": "run", "num_steps": 100_000},
        rollout={"engine": engine, "max_response_tokens": 6},
        eval={"every": 0},
    )
    process = command.start(tmp_path, "train", "run.yaml")
    try:
        command.wait_for_step(process, tmp_path, 2, _PATIENCE_S)
        [first] = servers(process)
        first.kill()
        step = command.metrics(tmp_path / "run")[-1]["step"]
        command.wait_for_step(process, tmp_path, step + 3, _PATIENCE_S)
        [second] = servers(process)
        assert second.pid != first.pid
        assert max(abs_prob_shifts(tmp_path / "run")) < SAME_WEIGHTS
        left = [second, *second.children(recursive=True)]
        assert len(left) > 2
        process.kill()
        process.wait()
        assert command.still_running(left, within_s=30) == []
    finally:
        command.kill_group(process)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk that is small enough to fill")
def test_what_ends_a_run_is_named_and_the_run_goes_on_when_it_is_mended(tmp_path: Path) -> None:
    """First every new server dies at once, then the disk is full by which weights travel."""
    disk, broken, python = tmp_path / "disk", tmp_path / "broken", tmp_path / "python"
    disk.mkdir()
    python.write_text(f'#!/bin/sh\n[ -e {broken} ] && exit 3\nexec {PYTHON} "$@"\n')
    python.chmod(0o755)
    engine = {"name": "sglang", "python": str(python), "sync": "disk", "sync_dir": str(disk), "max_restarts": 1}
    command.prepare(
        tmp_path,
        run={"run_dir": "run", "num_steps": 60},
        rollout={"engine": engine, "max_response_tokens": 6},
        eval={"every": 0},
        checkpoint={"every": 1, "keep": 1},
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=True)
    try:
        process = command.start(tmp_path, "train", "run.yaml")
        command.wait_for_step(process, tmp_path, 2, _PATIENCE_S)
        broken.touch()
        servers(process)[0].kill()
        code, output = command.finish(process, tmp_path, _PATIENCE_S)
        assert code == 1 and "ended with exit code 3" in output, output
        assert "drpo-megatron train --resume run" in output
        broken.unlink()

        process = command.start(tmp_path, "train", "--resume", "run")
        step = command.metrics(tmp_path / "run")[-1]["step"]
        command.wait_for_step(process, tmp_path, step + 1, _PATIENCE_S)
        fill_until_it_ends(process, disk / "filler")
        code, output = command.finish(process, tmp_path, _PATIENCE_S)
        assert code == 1 and "set rollout.engine.sync_dir to a larger disk" in output, output
        (disk / "filler").unlink()
        assert not any(disk.iterdir())

        code, output = command.finish(command.start(tmp_path, "train", "--resume", "run"), tmp_path, _PATIENCE_S)
        assert code == 0, output
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    assert [row["step"] for row in command.metrics(tmp_path / "run")] == list(range(61))
    assert max(abs_prob_shifts(tmp_path / "run")) < SAME_WEIGHTS


def fill_until_it_ends(process: Any, file: Path) -> None:
    """Again and again, since a synced file that is removed makes room for the next one."""
    deadline = time.monotonic() + _PATIENCE_S
    with file.open("wb", buffering=0) as stream:
        while process.poll() is None:
            assert time.monotonic() < deadline
            try:
                stream.write(bytes(4096))
            except OSError:
                time.sleep(0.01)


def servers(process: Any) -> list[psutil.Process]:
    return [p for p in command.descendants(process) if any("sglang_launch.py" in word for word in p.cmdline())]
