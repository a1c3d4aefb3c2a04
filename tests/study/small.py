"""A study of a tiny model, and synthetic metrics of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from drpo_megatron.config import save_config
from drpo_megatron.study.cells import new_record
from drpo_megatron.study.runs import Run
from tests.orchestration import command

STUDY: dict[str, Any] = {
    "name": "small",
    "base": "run.yaml",
    "overrides": {"run.num_steps": 2},
    "prepare": {"run.num_steps": 0},
    "seeds": [0],
    "axes": {
        "objective": {"grpo": {"objective": "grpo"}, "drpo": {"objective": {"name": "drpo", "delta": 0.15}}},
        "anchor": {"rollout": {}, "recompute": {"objective.anchor": "recompute"}},
    },
}


def write_base(directory: Path) -> Path:
    """`run.yaml` with all that it names, in `directory`, which is returned."""
    command.prepare(directory, run={"run_dir": None})
    return directory


def write_run(run: Run, accuracies: list[float], state: str = "done", **record: Any) -> None:
    """What a run leaves, evaluated in every step: step 0 before RL."""
    run.path.mkdir(parents=True)
    save_config(run.config, run.path / "config.yaml")
    rows = [{"step": step, "eval/accuracy": accuracy} for step, accuracy in enumerate(accuracies)]
    for row in rows[1:]:
        row |= {
            "reward/mean": row["eval/accuracy"],
            "mismatch/abs_prob_shift/mean": 1e-3 * (1 + row["step"]),
            "shift/abs_prob_shift/mean": 2e-2,
            "objective/weight/min": -0.5,
            "objective/weight/mean": 1.0,
            "objective/weight/max": 1.5,
            "objective/beyond_boundary_share": 0.01 * row["step"],
            "policy/entropy/mean": 0.5,
            "optim/grad_norm": 1.0,
            "objective/weight_share/0.9_to_1.1": 0.9,
            "objective/weight_share/below_-1": 0.1,
            "objective/stopped_share/positive/mu_below_0.01": 0.2,
            "precision/layer_00/qkv/activation/sqnr_db": 30.0,
            "precision/layer_00/qkv/activation/underflow_share": 0.01,
            "precision/layer_00/router_flips": 0.05,
        }
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state == "done":
        (run.path / "summary.json").write_text("{}")
    made = new_record(run)
    made.state, made.seconds, made.attempts = state, 10.0, 1  # type: ignore[assignment]
    for name, value in record.items():
        setattr(made, name, value)
    made.save(run.path)
