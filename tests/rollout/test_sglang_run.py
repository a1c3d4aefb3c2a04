"""`drpo-megatron train` with SGLang: servers that somebody else runs, and servers of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.orchestration import command
from tests.rollout.conftest import PYTHON, Served

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
    assert len(shifts := abs_prob_shifts(tmp_path / "run")) == 2 and max(shifts) < 1e-4
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
        assert max(abs_prob_shifts(tmp_path / "run")) < 1e-4
        left = [second, *second.children(recursive=True)]
        assert len(left) > 2
        process.kill()
        process.wait()
        assert command.still_running(left, within_s=30) == []
    finally:
        command.kill_group(process)


def servers(process: Any) -> list[psutil.Process]:
    return [p for p in command.descendants(process) if any("sglang_launch.py" in word for word in p.cmdline())]
