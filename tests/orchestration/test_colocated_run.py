"""A whole run whose server stands beside the trainer and gives its memory back at every step, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.orchestration import command
from tests.rollout.conftest import PYTHON
from tests.tiny import SAME_WEIGHTS

_PATIENCE_S = 900.0


@pytest.mark.slow
def test_a_colocated_run_trains_on_its_own_draws_and_ends_as_without_a_server(tmp_path: Path) -> None:
    """SGLang's draws have no seed, so the run is compared with another one that trains on the same draws."""
    if not PYTHON.exists():
        pytest.skip("SGLang's environment is not there; `make sglang-cpu` sets it up")
    command.prepare(
        tmp_path,
        run={"run_dir": "run", "num_steps": 3},
        cluster={"placement": "colocated"},
        rollout={"engine": {"name": "sglang", "python": str(PYTHON)}, "max_response_tokens": 6, "dump": True},
        eval={"every": 1},
        checkpoint={"every": 0, "save_hf": False},
    )
    code, output = command.finish(command.start(tmp_path, "train", "run.yaml"), tmp_path, _PATIENCE_S)
    assert code == 0, output
    colocated = command.metrics(tmp_path / "run")
    # Before the first optimiser step of a rollout pi is mu: the server drew with the weights of the step before.
    assert [row["mismatch/abs_prob_shift/max"] < SAME_WEIGHTS for row in colocated[1:]] == [True] * 3
    assert all("eval/reward/mean" in row for row in colocated)
    log = (tmp_path / "run" / "logs" / "server-0.log").read_text()
    calls = [line.split('"POST /')[1].split(" ")[0] for line in log.splitlines() if '"POST /' in line]
    # Before the ranks start, and in each of three steps; the memory of weights and of the cache comes back one by one.
    assert calls.count("release_memory_occupation") == 4
    assert calls.count("resume_memory_occupation") == 8
    assert '" 500 ' not in log and '" 400 ' not in log

    arguments = ("run/config.yaml", "--from-dump", "run/rollouts", "run.run_dir=again", "rollout.dump=false")
    code, output = command.run(tmp_path, "train", *arguments)
    assert code == 0, output
    for row, other in zip(colocated[1:], command.metrics(tmp_path / "again")[1:], strict=True):
        numbers = {name: x for name, x in row.items() if name.startswith(("objective/", "optim/", "mismatch/", "loss"))}
        assert len(numbers) > 10
        assert {name: other[name] for name in numbers} == numbers
