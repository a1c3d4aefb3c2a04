"""The early warning: mismatch against its own history, on series whose answer is plain; and a run that falls back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from drpo_megatron.config.precision import EarlyWarningSection
from drpo_megatron.orchestration.early_warning import EarlyWarning
from tests.orchestration import command


def warning(**keys: Any) -> EarlyWarning:
    return EarlyWarning(EarlyWarningSection.model_validate({"factor": 3, "window": 2, "min_history": 4} | keys))


def steps_with_a_warning(rule: EarlyWarning, series: list[float]) -> list[int]:
    return [step for step, mismatch in enumerate(series) if rule.observe(mismatch) is not None]


def test_it_warns_once_when_the_window_exceeds_the_factor() -> None:
    # Medians of the past are 0.01; means of two: .01 ..., (.01 + .05) / 2 = .03 is not above 3 x .01, .055 is.
    series = [0.01] * 6 + [0.05, 0.06, 0.07]
    rule = warning()
    assert steps_with_a_warning(rule, series) == [7]
    # Median of [.01 x 6, .05] is .01; the mean of (.06, .07) over it is 6.5.
    assert rule.growth() == pytest.approx(6.5)


def test_it_warns_again_after_a_recovery() -> None:
    assert steps_with_a_warning(warning(), [0.01] * 8 + [0.08, 0.08, 0.01, 0.01, 0.01, 0.08]) == [8, 13]


def test_it_is_silent_without_history_and_where_nothing_can_be_wrong() -> None:
    assert steps_with_a_warning(warning(), [0.01, 0.01, 0.01, 0.5, 0.5]) == []
    assert steps_with_a_warning(warning(), [1e-7] * 10 + [1e-5] * 5) == []
    assert steps_with_a_warning(warning(), [0.01] * 6 + [float("nan")] * 5) == []


def test_its_state_goes_on_where_it_was() -> None:
    series = [0.01] * 6 + [0.05, 0.06, 0.07]
    first, second = warning(action="bf16-rollout"), warning(action="bf16-rollout")
    assert steps_with_a_warning(first, series[:7]) == [] and not first.has_fallen_back
    second.load_state_dict(first.state_dict())
    assert steps_with_a_warning(second, series[7:]) == [0] and second.has_fallen_back


@pytest.mark.slow
def test_a_run_falls_back_to_unquantised_rollouts_and_another_stops(tmp_path: Path) -> None:
    rule = {"factor": 0.01, "window": 1, "min_history": 1}
    precision = {"rollout": {"name": "mxfp4"}, "monitor": {"early_warning": rule | {"action": "bf16-rollout"}}}
    command.prepare(tmp_path, precision=precision)
    code, output = command.run(tmp_path, "train", "run.yaml")
    assert code == 0, output
    assert "warning: mismatch between engine and trainer" in output
    assert "rollouts are unquantised from now on" in output
    mismatch = [row["mismatch/abs_prob_shift/max"] for row in command.metrics(tmp_path / "run")[1:]]
    # The second step is the first with a history; what is drawn after it comes from the trainer's own numbers.
    assert min(mismatch[:2]) > 1e-3 > 1e-4 > max(mismatch[2:])

    arguments = ["run.run_dir=stops", "precision.monitor.early_warning.action=stop"]
    code, output = command.run(tmp_path, "train", "run.yaml", *arguments)
    assert code != 0
    assert "stopped after step 2, as precision.monitor.early_warning.action=stop says: mismatch between" in output
    assert "resume with: drpo-megatron train --resume stops" in output
    assert (tmp_path / "stops" / "checkpoints" / "step_000002").is_dir()
